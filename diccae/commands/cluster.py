"""`diccae cluster`: exact distributed k-means over any Parquet of vectors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from clustering.config import KMeansConfig, PoolConfig
from diccae.args import Options, refuse_negative_seed
from diccae.config import RunConfig, explain
from diccae.errors import UsageError
from diccae.reach import check_reach
from diccae.resources import Demand, check_fits, start_ray

Config = TypeVar("Config", KMeansConfig, PoolConfig)


@dataclass(frozen=True)
class ClusterArgs:
    """k-means whose result is the same to the bit for any number of actors."""

    vectors: str
    """Parquet file or folder of vectors."""
    out: str
    """Folder or URI for labels.parquet, centroids.parquet and summary.json."""
    k: int
    """Number of clusters."""
    column: str = "embedding"
    """Column: list<float>, fixed-size list, or fixed-size binary with its dtype and dim."""
    id_column: str | None = None
    """Column of ids; None: id, clip_id or key, or the row number."""
    actors: int = 2
    """Actors the rows are spread over; 1 runs in this process without Ray."""
    seed: int = 0
    """Equal seeds give equal bits."""
    config: str | None = None
    """YAML config; its sections `clustering` and `pool` are used."""
    json: bool = False
    """Print the summary as one JSON line."""
    run: RunConfig = field(default_factory=RunConfig)


OPTIONS = Options("cluster", ClusterArgs, ("clustering", "pool"))


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    refuse_negative_seed(args.seed)
    from clustering.vectors.cluster import cluster_vectors

    kmeans = _changed(args.run.clustering, k=args.k)
    pool = _changed(args.run.pool, n_actors=args.actors)

    def start() -> None:
        start_ray()
        actors = Demand(*pool.groups(kmeans).compute, keeps_off=True)
        check_fits([actors], "--actors or --pool.cpus-per-actor")
        check_reach({"--vectors": args.vectors})

    summary = cluster_vectors(
        args.vectors,
        args.out,
        kmeans,
        pool,
        seed=args.seed,
        column=args.column,
        id_column=args.id_column,
        start_ray=start,
    )
    if args.json:
        print(json.dumps(summary))
        return 0
    counts = summary["counts"]
    print(
        f"inertia {summary['inertia']:.6g} after {summary['iterations']} iterations; sizes "
        f"{min(counts):,} to {max(counts):,}; digest {summary['digest'][:16]}; "
        f"{summary['seconds']:.1f} s; written to {args.out}"
    )
    return 0


def _changed(config: Config, **options: Any) -> Config:
    """The config with these fields. Raises: UsageError for a value out of range."""
    try:
        return type(config).model_validate(config.model_dump() | options)
    except ValidationError as error:
        raise UsageError(explain(error, type(config))) from None
