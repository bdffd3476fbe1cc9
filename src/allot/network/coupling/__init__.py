"""Which channels of a model have to go together: found, then proven on numbers."""
