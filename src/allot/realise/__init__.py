"""Masks turned into files: written whole, re-opened, recounted."""
