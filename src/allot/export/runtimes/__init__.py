"""The models that a runtime opens: written, opened again, run."""
