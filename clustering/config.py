"""KMeansConfig, which decides a label, and PoolConfig, which decides where and how fast it is made.

Pure pydantic models: imports neither numpy nor Ray, so that `--help` answers at once.
Invariant: a field that can change a label, an id or a prototype is one of `KMeansConfig`, so that
the whole of it identifies a round; a field of `PoolConfig` changes no bit.
"""

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """Immutable config: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class GuardConfig(Frozen):
    """When a finished round is withheld instead of published (collapse guard)."""

    min_effective_frac: float = Field(0.25, ge=0, le=1)
    """Smallest exp(entropy of the cluster sizes) as a share of K."""
    max_mean_cosine: float = Field(0.95, ge=-1, le=1)
    """Largest mean cosine over all pairs of rows; 1 turns the check off."""
    max_churn: float = Field(0.98, ge=0, le=1)
    """Largest 1 - NMI with the round before; 1 turns the check off."""
    min_coverage: float = Field(0.5, ge=0, le=1)
    """Smallest share of the expected rows that is in the bank."""


Init = Literal["random", "kmeans++"]
"""Names of the cold starts; `kmeans.start.STARTS` has the function of each."""


class KMeansConfig(Frozen):
    """One clustering (k-means, full Lloyd) and whom its labels teach."""

    k: int = Field(32, ge=1)
    """Number of clusters K."""
    iterations: int = Field(20, ge=1)
    """Most Lloyd iterations from a cold start."""
    warm_iterations: int = Field(10, ge=1)
    """Most Lloyd iterations from the labels of the round before."""
    tol: float = Field(1e-4, ge=0)
    """Stop when the inertia falls by less than this share; 0 stops only at a fixed point."""
    spherical: bool = True
    """Rows and centroids of unit length (cosine); false is Euclidean k-means."""
    init: Init = "kmeans++"
    """Cold start: K rows of smallest hash (free), or greedy k-means++ on a sample."""
    init_sample: int = Field(16, ge=1)
    """Rows per centroid in the sample of `kmeans++`, at least 4096 rows in all."""
    init_trials: int = Field(8, ge=1)
    """Starts of `kmeans++` of which the best is taken; fewer when K is above 250, where one start
    costs seconds."""
    seed_weight: int = Field(10, ge=1)
    """Where the labels of some rows are known: how many rows each counts as in its own centroid."""
    empty: Literal["split", "keep"] = "split"
    """An empty cluster takes half of a large one, or keeps its centroid."""
    balance: Literal["none", "sinkhorn"] = "none"
    """`sinkhorn` pulls cluster sizes together; softly, with few iterations."""
    balance_epsilon: float = Field(0.02, gt=0)
    """Temperature of the balancing, in cosine units."""
    balance_iterations: int = Field(3, ge=1)
    """Sinkhorn iterations; 3 cost no quality, 30 do on unequal classes."""
    max_points_per_centroid: int | None = Field(None, ge=1)
    """Fit on about K times this many rows (smallest hash), then label all; None fits on all."""
    heads: int = Field(1, ge=1)
    """Independent clusterings of the same rows with other seeds."""
    targets: Literal["mean", "concat", "own", "swapped"] = "mean"
    """What is clustered and whom it teaches: the mean or the concatenation of the streams teaches
    all; `own` clusters each stream for itself; `swapped` clusters each stream for the others."""
    streams: tuple[str, ...] = Field(("audio", "video"), min_length=1)
    """Slices of a bank row that are clustered."""
    guard: GuardConfig = GuardConfig()
    """Collapse guard."""
    vshards: int = Field(64, ge=1, le=4096)
    """Virtual shards of the bank: fixed, so that results do not depend on the number of actors."""
    block_rows: int = Field(2048, ge=16)
    """Rows of one matrix product; fewer cost up to 15 % at wide rows."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where rows are assigned; faiss on a GPU (`cuda`) rounds scores otherwise than a CPU."""

    @model_validator(mode="after")
    def _consistent(self) -> "KMeansConfig":
        if self.balance == "sinkhorn" and not self.spherical:
            raise ValueError("balance = sinkhorn needs spherical = true: its scores are cosines")
        if len(set(self.streams)) != len(self.streams):
            raise ValueError(f"streams = {self.streams} names one twice")
        if self.targets == "swapped" and len(self.streams) < 2:
            raise ValueError(f"targets = swapped needs two streams, found {self.streams}")
        return self


class ActorGroup(NamedTuple):
    """Like actors that are alive at the same time, and what Ray reserves for each."""

    part: str
    """What they do, for a table of who wants what."""
    n: int
    cpus: float
    gpus: float


class PoolGroups(NamedTuple):
    """All actors of a pool that makes rounds beside training."""

    compute: ActorGroup
    """The only ones that `diccae cluster` starts."""
    banks: ActorGroup
    coordinator: ActorGroup


class PoolConfig(Frozen):
    """The actors that cluster, and what waits between them and training."""

    n_actors: int = Field(2, ge=1)
    """Compute actors."""
    n_banks: int | None = Field(None, ge=1)
    """Bank actors; None: one for every two compute actors."""
    cpus_per_actor: float = Field(0.5, gt=0)
    """CPUs a compute actor reserves; it computes on one thread."""
    cpus_per_bank: float = Field(0.1, ge=0)
    """CPUs a bank actor, and the coordinator, reserve."""
    gpus_per_actor: float = Field(1.0, gt=0)
    """GPUs a compute actor reserves where `clustering.device` = cuda."""
    reducer: Literal["auto", "driver", "tree"] = "auto"
    """Who adds the partial sums: the coordinator, or the actors in a tree (auto: above 16)."""
    fan_in: int = Field(8, ge=2)
    """Partial sums one step of the tree adds."""
    coalesce_rows: int = Field(2048, ge=1)
    """Rows a training worker collects before it sends them."""
    coalesce_s: float = Field(1.0, gt=0)
    """Longest time a row waits to be sent."""
    buffer_rows: int = Field(65536, ge=1)
    """Rows a training worker holds while the bank is slow; then the oldest are dropped."""
    keep_vectors: int = Field(2, ge=1)
    """Rounds whose frozen vectors stay on storage; labels always stay."""

    @property
    def bank_actors(self) -> int:
        """Number of bank actors."""
        return self.n_banks if self.n_banks is not None else (self.n_actors + 1) // 2

    def groups(self, kmeans: KMeansConfig) -> "PoolGroups":
        """The actors that are started: what a resource check counts is what the pool asks for."""
        gpus = self.gpus_per_actor if kmeans.device == "cuda" else 0.0
        return PoolGroups(
            ActorGroup("clustering actors", self.n_actors, self.cpus_per_actor, gpus),
            ActorGroup("feature banks", self.bank_actors, self.cpus_per_bank, 0.0),
            ActorGroup("clustering coordinator", 1, self.cpus_per_bank, 0.0),
        )
