"""What surrounds a loop wherever it runs: data, checkpoints, models applied. Without Ray."""
