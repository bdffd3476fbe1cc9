"""The chain: from what a user asks to a `Result`."""
