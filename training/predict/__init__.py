"""A trained model applied to clips that no store holds, from the command line or from MLflow."""
