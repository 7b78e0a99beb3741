"""`diccae cluster`: exact distributed k-means over any Parquet of vectors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from diccae.args import parse
from diccae.config import RunConfig
from diccae.resources import start_ray


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
    """YAML config; its `clustering` section is used."""
    json: bool = False
    """Print the summary as one JSON line."""
    run: RunConfig = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("cluster", ClusterArgs, argv, ("clustering",))
    from clustering.vectors.cluster import cluster_vectors

    summary = cluster_vectors(
        args.vectors,
        args.column,
        args.k,
        args.actors,
        args.seed,
        args.out,
        args.run.clustering,
        start_ray=start_ray,
        id_column=args.id_column,
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
