"""How long layers and whole nets take, measured side by side."""
