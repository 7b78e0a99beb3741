"""Clips as something to look at and to listen to."""
