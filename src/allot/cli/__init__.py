"""The command line: verbs, options, and the only code that prints."""
