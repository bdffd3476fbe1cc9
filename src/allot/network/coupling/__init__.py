"""Which channels of a model have to be removed together: traced, then proven on numbers."""
