"""The way to a cluster: submit, image, KubeRay, MLflow server. Imports no other package of ours."""
