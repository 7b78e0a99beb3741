"""Exact spherical k-means: shares of vectors to labels and centroids."""
