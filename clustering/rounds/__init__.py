"""Clustering rounds: features as they are pushed, to labels that training reads."""
