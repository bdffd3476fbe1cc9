"""Times of layers and of whole nets, measured side by side."""
