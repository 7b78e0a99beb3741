"""ScaleConfig and TrackingConfig: what a run asks of its cluster, and where it is written down.

Knows nothing of what is trained. Invariant: nothing here, and nothing that NOT_DECIDING names,
changes what a run learns, but for last digits.
"""

from pydantic import Field, field_validator

from pipeline.config import LEASE_STALE_S
from pipeline.store.cached import ShardCache
from training.frozen import Frozen

NOT_DECIDING = (
    "scale.",
    "pool.",
    "tracking.",
    "ingest.",
    "rounds.timeout_s",
    "pretrain.micro_batch",
    "pretrain.compile",
    "pretrain.checkpoint_every",
    "pretrain.log_every",
)
"""Sections, and single keys, that a run may go on with other values of: how many workers there are,
where, how long they wait, in which pieces they compute, and what is written down when."""


class ScaleConfig(Frozen):
    """What training asks of the Ray cluster."""

    num_workers: int = Field(1, ge=1)
    """Training workers (the most, when elastic)."""
    min_workers: int | None = None
    """Elastic training goes on with this many."""
    use_gpu: bool = False
    """One GPU per worker."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Memory of the smallest card the run will have, for `doctor`; None: this machine's cards."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs a worker reserves."""
    threads_per_worker: int | None = Field(None, ge=1)
    """Torch threads of a CPU worker; None: its CPUs, at least 1."""
    reader_tasks: int = Field(1, ge=1)
    """Ray tasks that read and decode for one worker."""
    reader_cpus: float = Field(0.5, gt=0)
    """CPUs one of these tasks reserves."""
    max_failures: int = Field(3, ge=-1)
    """Worker failures a run survives; -1: any number."""
    shard_cache: str | None = None
    """Absolute path of a folder of each node's own disk that keeps what was read of a store in a
    bucket, so that each node reads it once; None: nothing is kept. A node that cannot use it is
    refused at the start; one that joins later reads the bucket. Of a store on a disk, and with
    `ablate --processes`, which decodes a store once, nothing is kept."""
    shard_cache_gib: float = Field(200.0, gt=0)
    """The most that it holds on a node; a twentieth of the disk, and up to 4 GiB besides, stay free
    in any case."""
    lease_stale_s: float = Field(LEASE_STALE_S, gt=1)
    """A start of a command that was silent for this long is taken for dead: the next one goes on
    with its run folder, and it writes nothing there any more."""

    @field_validator("shard_cache")
    @classmethod
    def _on_a_disk_of_the_node(cls, folder: str | None) -> str | None:
        if folder is not None and ("://" in folder or not folder.startswith("/")):
            raise ValueError(
                "neither a URL nor a relative path is a folder of each node's own disk; name an "
                "absolute path such as /mnt/nvme/shards, or None"
            )
        return folder

    @property
    def cache(self) -> ShardCache | None:
        """Where readers keep what they have read."""
        if self.shard_cache is None:
            return None
        return ShardCache(self.shard_cache, int(self.shard_cache_gib * 2**30))

    @property
    def n_threads(self) -> int:
        """Torch threads of a CPU worker."""
        return self.threads_per_worker or max(1, int(self.cpus_per_worker))


class TrackingConfig(Frozen):
    """Where the run is written down."""

    uri: str | None = None
    """MLflow tracking URI; None: the variable MLFLOW_TRACKING_URI, else sqlite:///<out>/mlflow.db,
    and no MLflow for a run in a bucket."""
    experiment: str | None = None
    """MLflow experiment; None: the variable MLFLOW_EXPERIMENT_NAME, else `diccae`."""
    register_as: str | None = None
    """Name under which `diccae report` registers the run's model, with the alias `candidate`; None
    registers nothing."""
    system_metrics: bool | None = None
    """CPU, memory, GPU and network of every node while it trains; None: where MLflow is a
    server."""

    def of_nodes(self, uri: str) -> bool:
        """Whether the nodes are measured. Args: uri: where the MLflow run is."""
        is_server = uri.startswith(("http://", "https://"))
        return is_server if self.system_metrics is None else self.system_metrics
