"""Weights in files: ours, and other projects' layouts."""
