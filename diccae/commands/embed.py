"""`diccae embed`: feature store and encoder to a Parquet file of vectors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diccae.args import parse
from diccae.config import RunConfig


@dataclass(frozen=True)
class EmbedArgs:
    """Write id, label and the embeddings of every clip; `diccae cluster` reads them."""

    store: str
    """URI of the feature store."""
    encoder: str
    """Folder of an encoder, such as OUT/encoder; any URI."""
    out: str
    """Parquet file to write, a path or URI: columns id, label, audio, video, fusion, embedding."""
    split: str = "train"
    """Split of the store."""
    space: Literal["z", "h"] = "h"
    """`h`: class-head embeddings; `z`: the trunk's features."""
    version: int | None = None
    """Version of the store; None: the newest."""
    config: str | None = None
    """YAML config of the run the encoder comes from (its `data` section)."""
    run: RunConfig = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("embed", EmbedArgs, argv, ("data", "evaluate", "scale"))
    from diccae.reach import check_reach
    from diccae.resources import check_fits, start_ray
    from diccae.stages.evaluate import inference_demands
    from diccae.stages.statistics import for_embedding
    from pipeline.store.store import FeatureStore
    from training.data.rows import index_rows
    from training.on_ray.inference import Job, run_jobs, write_vectors
    from training.predict.apply import Models

    snapshot = FeatureStore.open(args.store).snapshot(args.version)
    run = for_embedding(args.run, args.encoder, snapshot.spec)
    index = index_rows(snapshot, args.split)
    start_ray()
    check_fits(inference_demands(run.scale))
    check_reach({"--store": args.store, "--encoder": args.encoder})
    job = Job(index, run.evaluate.frames, (args.space,))
    [outputs] = run_jobs([job], Models(args.encoder), run.data, run.scale, run.evaluate)
    write_vectors(index, outputs, args.space, args.out)
    print(f"{args.out}: {len(index):,} clips of {args.store} version {snapshot.version}")
    return 0
