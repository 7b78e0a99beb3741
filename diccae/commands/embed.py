"""`diccae embed`: feature store and encoder to a Parquet file of vectors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diccae.args import Options
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
    space: Literal["z", "h"] | None = None
    """`h`: class-head embeddings; `z`: the trunk's features; None: whichever was trained to match
    across modalities."""
    version: int | None = None
    """Version of the store; None: the newest."""
    config: str | None = None
    """YAML config with a `data` and an `evaluate` section; None: frames as the encoder says."""
    run: RunConfig = field(default_factory=RunConfig)


OPTIONS = Options("embed", EmbedArgs, ("data", "evaluate", "scale"))


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv, _as_trained)
    from diccae.stages.backend import ON_RAY
    from diccae.stages.statistics import for_embedding
    from pipeline.store.store import FeatureStore
    from pipeline.store.vacuumed import whole_snapshot
    from training.data.rows import index_rows
    from training.on_ray.inference import write_vectors
    from training.predict.apply import Models
    from training.predict.jobs import Job
    from training.weights.card import Applied
    from training.weights.files import read_card

    snapshot = whole_snapshot(FeatureStore.open(args.store), args.version)
    run = for_embedding(args.run, args.encoder, snapshot.spec)
    index = index_rows(snapshot, args.split)
    ON_RAY.ready_to_apply({"--store": args.store, "--encoder": args.encoder}, None, run.scale)
    space = args.space or Applied.of(run, read_card(args.encoder, "encoder")[0].space).space
    job = Job(index, run.evaluate.frames, (space,))
    [outputs] = ON_RAY.apply([job], Models(args.encoder), run.data, run.scale, run.evaluate)
    write_vectors(index, outputs, space, args.out)
    print(f"{args.out}: {space} of {len(index):,} clips of {args.store} version {snapshot.version}")
    return 0


def _as_trained(args: EmbedArgs) -> RunConfig | None:
    """The defaults with the frames that the encoder is evaluated on, if it says so."""
    from training.weights.files import read_card

    applied = read_card(args.encoder, "encoder")[0].applied
    if args.config is not None or applied is None:
        return None
    defaults = RunConfig()
    data = defaults.data.model_copy(update={"frames_per_clip": applied.frames_per_clip})
    evaluate = defaults.evaluate.model_copy(update={"frames": applied.frames})
    return defaults.model_copy(update={"data": data, "evaluate": evaluate})
