"""Comparison of two models clip by clip, ours or other projects'."""
