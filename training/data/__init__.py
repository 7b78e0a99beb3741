"""Rows of a feature store to augmented batches."""
