"""Manifests of a cluster, from the templates of this folder and a typed config.

Knows nothing of Kubernetes beyond the files' own words. A template keeps its comments, and each
value enters it as JSON, which YAML reads as exactly that value.
Invariant: every name of a template is filled, and what is filled is used.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from deploy.command_line import values_of
from deploy.config import ClusterConfig, GroupConfig
from deploy.errors import ManifestError

TEMPLATES = {
    "rayjob.yaml": "kuberay/rayjob.yaml",
    "networkpolicy.yaml": "kuberay/networkpolicy.yaml",
    "mlflow.yaml": "mlflow/kubernetes.yaml",
    "ray-cluster.yaml": "ray-cluster.yaml",
}
"""Name of a rendered file: its template in this folder."""

MAXIMA = "DICCAE_AUTOSCALING_GROUPS"
"""Variable in which a job reads what its cluster can grow to."""
JOB = "DICCAE_JOB"
"""Variable by which an attempt of a job knows the lease of the one before it as its own. Of the job
alone: who submits something else to its cluster is somebody else."""
SHARD_CACHE = "/shard-cache"
"""Where the pods that read see the disk of `shard_cache_gib`."""
KEEPERS = ("ablate", "finetune", "pretrain")
"""Commands that get that disk, as `scale.shard_cache`: they read a store once an epoch."""
ONCE = ("embed", "evaluate")
"""Commands that have the setting and read a store once or twice: what they kept would go with their
pods."""
_RAYS_PROFILE = "ray-autoscaler-v1"
_RAYS_FOLDER = "ray-logs"
"""KubeRay mounts a volume of this name into the autoscaler's container, too: under another name its
logs would lie where the head's dashboard does not see them."""

_PLAIN = {
    "name", "namespace", "operator_namespace", "token_secret", "storage_secret", "mlflow_secret",
    "mlflow_artifacts", "token_file", "cpu_image", "train_image", "mlflow_image", "region",
}  # fmt: skip
"""Fields whose pattern leaves nothing to quote, so that they may stand inside other words."""


_COMPOSED = {
    "head", "decode", "train", "env", "command", "shared_claim", "shared_mount", "worker_profile",
    "image_pull_secrets", "gpu_image", "shard_cache_gib",
}  # fmt: skip
"""Fields that reach the templates as parts of other values."""


def render(config: ClusterConfig) -> dict[str, str]:
    """The text of every manifest, by file name.

    Raises: ManifestError if there is no command, a template asks for a value that the config does
        not have, or the command writes to a disk that only one pod has.
    """
    if not config.command:
        raise ManifestError("command: empty, expected the words after diccae, such as pretrain ...")
    _refuse_runs_in_one_pod(config)
    _refuse_another_shard_cache(config)
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
    rendered = render(config)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in rendered.items():
        (folder / name).write_text(text)
        paths.append(folder / name)
    return paths


def _values(config: ClusterConfig) -> list[tuple[str, Any]]:
    plain = config.model_dump(exclude=_COMPOSED)
    values: dict[str, Any] = {
        **plain,
        "entrypoint": shlex.join(["python", "-m", "diccae", *_command(config)]),
        "env": [
            {"name": key, "value": value}
            for key, value in (config.env | {MAXIMA: json.dumps(maxima(config))}).items()
        ],
        "job_env": {"PYTHONUNBUFFERED": "1", JOB: f"{config.namespace}/{config.name}"},
        "pull_secrets": [{"name": name} for name in config.image_pull_secrets],
        "train_image": config.gpu_image if config.train.gpus else config.cpu_image,
        "train_run_options": [
            # Docker refuses it where there is no card.
            *(["--gpus all"] if config.train.gpus else []),
            f"--shm-size={config.train.shm_mib * 2**20}",
        ],
        "idle_minutes": max(1, config.idle_s // 60),
        "mounts": _mounts(config),
        "reader_mounts": [*_mounts(config), *_cache_mounts(config)],
        "head_start": _started_with(
            config.env | {MAXIMA: json.dumps(maxima(config))},
            "--head --port=6379 --object-manager-port=8076 --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ),
        "worker_start": _started_with(
            config.env, "--address=$RAY_HEAD_IP:6379 --object-manager-port=8076"
        ),
        "profile": {"Name": config.worker_profile or _RAYS_PROFILE},
        "max_workers": config.decode.max_nodes + config.train.max_nodes,
    }
    for name in ("head", "decode", "train"):
        group = getattr(config, name)
        values |= _group_values(name, group)
        reads = name != "head"  # It takes no work.
        values[f"{name}_volumes"] = _volumes(config, group, reads)
        values[f"{name}_requests"] = _requests(config, group, reads)
    return list(values.items())


def _started_with(env: Mapping[str, str], options: str) -> str:
    """The command that starts Ray on a node of `ray up`, whose processes inherit the variables."""
    words = shlex.join(f"{key}={value}" for key, value in env.items())
    return f"env {words} RAY_AUTH_MODE=token ray start {options}"


def maxima(config: ClusterConfig) -> list[dict[str, Any]]:
    """The most that the autoscaler can start: what a run is compared with."""
    return [
        {"role": role, "nodes": group.max_nodes, "cpus": group.cpus, "gpus": group.gpus}
        for role, group in (("decode", config.decode), ("train", config.train))
    ]


def _mounts(config: ClusterConfig) -> list[dict[str, str]]:
    mounts = [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": _RAYS_FOLDER, "mountPath": "/tmp/ray"},
    ]
    if config.shared_claim is not None:
        mounts.append({"name": "shared", "mountPath": config.shared_mount})
    return mounts


def _command(config: ClusterConfig) -> tuple[str, ...]:
    """The words after `diccae`, with what is true here of the cache of the nodes: the run, or the
    file of `--config`, may name one of elsewhere."""
    if config.command[0] not in (*KEEPERS, *ONCE) or _says_no_cache(config):
        return config.command
    if not (gib := _cache_gib(config)):
        return (*config.command, "--scale.shard-cache", "None")
    options = ("--scale.shard-cache", SHARD_CACHE, "--scale.shard-cache-gib", str(gib))
    return (*config.command, *options)


def _cache_gib(config: ClusterConfig) -> int:
    """Size of the cache that the nodes have for this command; 0: none."""
    is_kept = config.command[0] in KEEPERS and not _says_no_cache(config)
    return config.shard_cache_gib if is_kept else 0


def _says_no_cache(config: ClusterConfig) -> bool:
    return any(
        "None" in values_of(config.command, option)
        for option in ("--scale.shard-cache", "--scale.shard_cache")
    )


def _cache_mounts(config: ClusterConfig) -> list[dict[str, str]]:
    return [{"name": "shard-cache", "mountPath": SHARD_CACHE}] if _cache_gib(config) else []


def _cache_disk(config: ClusterConfig) -> str:
    """Of its volume. A pod whose volume grows beyond is evicted, and folders take some of it."""
    gib = _cache_gib(config)
    return f"{gib + 1 + gib // 50}Gi"


def _requests(config: ClusterConfig, group: GroupConfig, reads: bool) -> dict[str, str]:
    """What a machine must have for the pod to be put on it."""
    requests = {"cpu": str(group.cpus), "memory": f"{group.memory_gib}Gi"}
    if reads and _cache_gib(config):
        requests["ephemeral-storage"] = _cache_disk(config)
    return requests


def _volumes(config: ClusterConfig, group: GroupConfig, reads: bool) -> list[dict[str, Any]]:
    """/dev/shm of at least the object store, else Ray falls back to the disk; Ray's own folder;
    what readers keep."""
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{group.shm_mib}Mi"}},
        {"name": _RAYS_FOLDER, "emptyDir": {}},
    ]
    if config.shared_claim is not None:
        claim = {"claimName": config.shared_claim}
        volumes.append({"name": "shared", "persistentVolumeClaim": claim})
    if reads and _cache_gib(config):
        volumes.append({"name": "shard-cache", "emptyDir": {"sizeLimit": _cache_disk(config)}})
    return volumes


def _refuse_runs_in_one_pod(config: ClusterConfig) -> None:
    """Refuse a run folder or store that only one pod would have.

    Raises: ManifestError.
    """
    for option in ("--out", "--store"):
        for path in values_of(config.command, option):
            if "://" in path:
                continue
            shared = config.shared_claim is not None
            if shared and path.startswith(f"{config.shared_mount}/"):
                continue
            raise ManifestError(
                f"command: {option} {path} is on no disk that all pods share; "
                + (
                    f"put it below {config.shared_mount}"
                    if shared
                    else "set shared_claim to a "
                    f"ReadWriteMany claim and put it below {config.shared_mount}"
                )
                + ", or in a bucket (s3://...)"
            )


def _refuse_another_shard_cache(config: ClusterConfig) -> None:
    """Refuse a folder for shards on a disk that no pod has, or beyond its volume's size.

    Raises: ManifestError.
    """
    for key in ("shard-cache", "shard-cache-gib"):
        for option in (f"--scale.{key}", f"--scale.{key.replace('-', '_')}"):
            for value in values_of(config.command, option):
                if value == "None" and key == "shard-cache":
                    continue
                raise ManifestError(
                    f"command: {option} {value}: pods have no disk but the volumes of the "
                    f"manifest; leave it out and set shard_cache_gib (now "
                    f"{config.shard_cache_gib}) in the cluster's config, which mounts one at "
                    f"{SHARD_CACHE} and adds both options, or say --scale.shard-cache None"
                )


def _group_values(name: str, group: GroupConfig) -> dict[str, Any]:
    values = {
        "cpus": str(group.cpus),
        "memory": f"{group.memory_gib}Gi",
        "gpus": str(group.gpus),
        "object_store": str(group.object_store_bytes),
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
