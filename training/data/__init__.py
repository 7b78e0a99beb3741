"""Rows of a feature store to augmented batches: rows, order, reader, augment, views."""
