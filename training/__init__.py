"""Feature store and pseudo-labels to an encoder, and what it is worth."""
