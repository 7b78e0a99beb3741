"""Which clips there are, and their bytes."""
