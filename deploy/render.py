"""Manifests of a cluster, from the templates of this folder and a typed config.

Knows nothing of Kubernetes beyond the files' own words. A template keeps its comments, and each
value enters it as JSON, which YAML reads as exactly that value.
Invariant: every name of a template is filled, and what is filled is used.
"""

import json
import shlex
from pathlib import Path
from string import Template
from typing import Any

from deploy.config import ClusterConfig, GroupConfig
from deploy.errors import ManifestError

TEMPLATES = {
    "rayjob.yaml": "kuberay/rayjob.yaml",
    "networkpolicy.yaml": "kuberay/networkpolicy.yaml",
    "mlflow.yaml": "mlflow/kubernetes.yaml",
    "ray-cluster.yaml": "ray-cluster.yaml",
}
"""Name of a rendered file: its template in this folder."""

_PLAIN = {
    "name", "namespace", "operator_namespace", "token_secret", "storage_secret", "mlflow_secret",
    "mlflow_artifacts", "token_file", "cpu_image", "gpu_image", "mlflow_image", "region",
}  # fmt: skip
"""Fields whose pattern leaves nothing to quote, so that they may stand inside other words."""


def render(config: ClusterConfig) -> dict[str, str]:
    """The text of every manifest, by file name.

    Raises: ManifestError if a template asks for a value that the config does not have.
    """
    values = {key: text if key in _PLAIN else json.dumps(text) for key, text in _values(config)}
    rendered = {}
    for name, template in TEMPLATES.items():
        text = (Path(__file__).parent / template).read_text()
        try:
            rendered[name] = Template(text).substitute(values)
        except (KeyError, ValueError) as error:
            raise ManifestError(
                f"deploy/{template}: {error} is not a value of the config"
            ) from None
    return rendered


def write_manifests(config: ClusterConfig, out: str | Path) -> list[Path]:
    """Render into the folder `out`, which is made; the files, in order."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in render(config).items():
        (folder / name).write_text(text)
        paths.append(folder / name)
    return paths


def _values(config: ClusterConfig) -> list[tuple[str, Any]]:
    plain = config.model_dump(exclude={"head", "decode", "train", "env", "command"})
    values: dict[str, Any] = {
        **plain,
        "entrypoint": shlex.join(["python", "-m", "diccae", *config.command]),
        "env": [{"name": key, "value": value} for key, value in config.env.items()],
        "idle_minutes": max(1, config.idle_s // 60),
        "max_workers": config.decode.max_nodes + config.train.max_nodes,
    }
    for name in ("head", "decode", "train"):
        values |= _group_values(name, getattr(config, name))
    return list(values.items())


def _group_values(name: str, group: GroupConfig) -> dict[str, Any]:
    values = {
        "cpus": str(group.cpus),
        "memory": f"{group.memory_gib}Gi",
        "gpus": str(group.gpus),
        "object_store": str(group.object_store_bytes),
        "shm": f"{group.shm_mib}Mi",
        "shm_bytes": group.shm_mib * 2**20,
        "min": group.min_nodes,
        "max": group.max_nodes,
        "nodes": group.node_selector,
        "tolerations": [
            {"key": taint.key, "operator": "Exists", "effect": taint.effect}
            for taint in group.tolerations
        ],
        "instance": group.instance,
    }
    return {f"{name}_{key}": value for key, value in values.items()}
