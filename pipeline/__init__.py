"""Raw clips to a feature store. Knows nothing of models."""
