"""Metrics from a run's folder to MLflow."""
