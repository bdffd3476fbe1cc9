"""Promised values, compared with the values in the re-opened files."""
