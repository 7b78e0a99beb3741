"""The way to a cluster: submit, image, KubeRay, MLflow server. Imports none of the other packages."""
