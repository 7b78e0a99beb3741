"""Features to pseudo-labels. Knows nothing of audio, video or training."""
