"""The Ray actors that make rounds beside training."""
