"""Clustering of vector files: what `diccae cluster` does."""
