"""What a run did, as data, tables and pages."""
