"""Adapters: a run as other projects' benchmarks expect a model to look."""
