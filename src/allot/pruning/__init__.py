"""The chain: from a request to a `Result`."""
