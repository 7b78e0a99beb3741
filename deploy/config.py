"""What a cluster for diccae looks like: images, groups of nodes, how long a job may take.

Pure pydantic models: imports nothing heavy and knows nothing of any manifest's layout.
Invariant: no secret can be written in it, only the names of the secrets the cluster holds.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.errors import ManifestError

Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
"""A DNS label short enough for the suffixes KubeRay adds."""
Image = Annotated[str, Field(pattern=r"^[\w][\w./:@-]*$")]
"""An image reference, best by digest (name@sha256:...)."""

SECRET_NAMES = re.compile(r"TOKEN|PASSWORD|SECRET|CREDENTIAL|ACCESS_KEY", re.IGNORECASE)


class Frozen(BaseModel):
    """Immutable config: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Toleration(Frozen):
    """A taint of nodes that a group accepts."""

    key: str
    """The taint's key; any value of it is accepted."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"
    """The taint's effect."""


class GroupConfig(Frozen):
    """One group of equal nodes."""

    cpus: int = Field(8, ge=1)
    """CPUs of a node."""
    memory_gib: int = Field(32, ge=2)
    """Memory of a node, its object store included."""
    gpus: int = Field(0, ge=0)
    """GPUs of a node."""
    object_store_frac: float = Field(0.25, gt=0, le=0.6)
    """Share of the memory that holds Ray objects; /dev/shm is made that large."""
    min_nodes: int = Field(0, ge=0)
    """Nodes the autoscaler keeps."""
    max_nodes: int = Field(4, ge=0)
    """Nodes the autoscaler may start."""
    node_selector: dict[str, str] = {}
    """Kubernetes labels of the machines to use."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of those machines."""
    instance: str = ""
    """Machine type for `ray up`."""

    @model_validator(mode="after")
    def _ordered(self) -> "GroupConfig":
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes = {self.min_nodes} is over max_nodes = {self.max_nodes}")
        return self

    @property
    def object_store_bytes(self) -> int:
        """Bytes of the object store, whole MiB."""
        return int(self.memory_gib * 1024 * self.object_store_frac) * 2**20

    @property
    def shm_mib(self) -> int:
        """Size of /dev/shm: the object store and room for what torch shares."""
        return self.object_store_bytes // 2**20 + 256


class ClusterConfig(Frozen):
    """A job, the cluster that runs it, and the MLflow server beside it."""

    name: Name = "diccae"
    """Name of the job and its cluster."""
    namespace: Name = "diccae"
    """Kubernetes namespace of all objects."""
    operator_namespace: Name = "kuberay-system"
    """Namespace the KubeRay operator runs in."""
    operator_labels: dict[str, str] = Field(
        {"app.kubernetes.io/component": "kuberay-operator"}, min_length=1
    )
    """Labels of the operator's pod: whom the network policy lets ask for the state of the job. The
    default is what Helm's chart and kustomize both give it, unless `componentOverride` is set."""
    command: tuple[str, ...] = ()
    """What runs: the words after `diccae`; the images hold the configs in /app/configs. Nothing is
    rendered without one."""
    cpu_image: Image = "diccae:cpu"
    """Image of the head and the decode group (Dockerfile target `cpu`)."""
    gpu_image: Image = "diccae:gpu"
    """Image of the train group (target `gpu`)."""
    mlflow_image: Image = "diccae:mlflow"
    """Image of the MLflow server (target `mlflow`)."""
    image_pull_secrets: tuple[Name, ...] = ()
    """Secrets (type docker-registry) of the registry, for every pod."""
    ray_version: str = "2.60.0"
    """Ray of both images; token authentication needs 2.52 or newer."""
    token_secret: Name = "diccae-ray-token"
    """Secret whose key `auth_token` is the cluster's token."""
    storage_secret: Name = "diccae-storage"
    """Secret whose keys become variables of every pod (AWS_ACCESS_KEY_ID, ...); may be missing."""
    mlflow_secret: Name = "diccae-mlflow"
    """Secret with MLFLOW_BACKEND_STORE_URI and the keys of the artifact bucket."""
    shared_claim: Name | None = None
    """PersistentVolumeClaim (ReadWriteMany) that all pods mount; None: runs and
    stores are in buckets."""
    shared_mount: str = Field("/shared", pattern=r"^(/[\w.-]+)+$")
    """Where the pods see it."""
    mlflow_artifacts: str = Field("s3://mlflow", pattern=r"^[a-z0-9]+://[\w./-]+$")
    """Where the MLflow server keeps artifacts."""
    shard_cache_gib: int = Field(0, ge=0)
    """Disk of each decode and train node that keeps what readers have read of a store in a bucket;
    a command that trains gets it as `scale.shard_cache`, and its size as `scale.shard_cache_gib`.
    0: none, and the command is told so. Of both groups, since Ray puts readers on either."""
    env: dict[str, str] = {
        "RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    """Variables of every pod, beside these; nothing secret. null takes one of these away."""
    head: GroupConfig = GroupConfig(
        cpus=4, memory_gib=16, min_nodes=1, max_nodes=1, instance="m6i.xlarge"
    )
    """The head: driver, job server, autoscaler; no work."""
    decode: GroupConfig = GroupConfig(
        cpus=16, memory_gib=32, min_nodes=1, max_nodes=16, instance="c6i.4xlarge"
    )
    """Decodes, reads, clusters; may be spot machines."""
    train: GroupConfig = GroupConfig(
        cpus=32,
        memory_gib=128,
        gpus=8,
        min_nodes=0,
        max_nodes=1,
        tolerations=(Toleration(key="nvidia.com/gpu"),),
        instance="p4d.24xlarge",
    )
    """Trains; one worker per GPU."""
    retries: int = Field(3, ge=0)
    """New clusters after a failed job; the run goes on from its checkpoint."""
    deadline_s: int = Field(7 * 86400, ge=60)
    """Longest life of the job."""
    keep_finished_s: int = Field(3600, ge=0)
    """How long a finished cluster stays for a look."""
    idle_s: int = Field(300, ge=10)
    """Idle time after which a node is given back."""
    worker_profile: str = Field("", pattern=r"^[\w+=,.@-]*$")
    """`ray up`: name of the IAM instance profile of the workers, which lets them read and write the
    buckets; empty: Ray's own, `ray-autoscaler-v1`, which Ray gives to the head alone."""
    region: str = Field("us-east-1", pattern=r"^[a-z0-9-]+$")
    """Cloud region for `ray up`."""
    token_file: str = Field("~/.ray/auth_token", pattern=r"^[\w./~-]+$")
    """File of this machine that `ray up` copies to the nodes."""

    @model_validator(mode="before")
    @classmethod
    def _what_is_not_named_keeps_its_default(cls, given: Any) -> Any:
        """A group or `env` that names some of its keys says nothing of the others."""
        if not isinstance(given, Mapping):
            return given
        whole = dict(given)
        for name in ("env", "head", "decode", "train"):
            if isinstance(own := whole.get(name), Mapping):
                default = cls.model_fields[name].default
                known = default if isinstance(default, dict) else default.model_dump()
                whole[name] = {**known, **own}
        if isinstance(env := whole.get("env"), Mapping):
            whole["env"] = {key: value for key, value in env.items() if value is not None}
        return whole

    @model_validator(mode="after")
    def _no_literal_secret(self) -> "ClusterConfig":
        found = sorted(key for key in self.env if SECRET_NAMES.search(key))
        if found:
            raise ValueError(
                f"env holds {', '.join(found)}: manifests are no place for secrets; "
                f"put it in the secret {self.storage_secret}"
            )
        return self

    @model_validator(mode="after")
    def _clustering_has_nodes(self) -> "ClusterConfig":
        if self.decode.max_nodes == 0:
            raise ValueError(
                "decode.max_nodes = 0: the clustering pool keeps off the nodes that train, and "
                "would wait for ever; give it at least one node"
            )
        return self


def read_config(
    path: str | None, command: Sequence[str] = (), name: str | None = None
) -> ClusterConfig:
    """The cluster that a YAML file describes, for this command and of this name if they are given.

    Raises: ManifestError for a file that cannot be read or is no mapping; ValidationError for a key
        or value that is not allowed.
    """
    given: Any = {}
    try:
        if path is not None:
            given = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ManifestError(f"{path}: {error}") from None
    if not isinstance(given, dict):
        raise ManifestError(f"{path}: found a {type(given).__name__}, expected keys and values")
    told = {"command": command or None, "name": name}
    return ClusterConfig.model_validate(given | {k: v for k, v in told.items() if v is not None})
