"""Ablations: which variants are trained, their runs one by one or side by side, and the tables."""
