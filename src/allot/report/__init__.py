"""What a run did, as data and as tables."""
