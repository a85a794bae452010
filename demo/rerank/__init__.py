"""The demo cross-encoder: its texts, its training and its check."""
