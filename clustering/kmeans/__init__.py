"""Exact k-means, spherical or Euclidean: rows in any shares to labels and centroids."""
