"""The fine-tuning stage: `encoder/` of a run folder to its `classifier/`.

Knows nothing of pretraining. Invariant: the same call goes on from the newest checkpoint.
"""

import time
from functools import partial

from diccae.config import RunConfig
from diccae.resources import training_demands
from diccae.run_folder import RunFolder, watched
from diccae.stages.backend import ON_RAY, Backend
from diccae.stages.run_record import Say, pin_for, provenance, with_status
from diccae.stages.statistics import settle
from training.data.order import BatchPlan
from training.data.rows import RowIndex, with_labels
from training.loop.finetuner import idle_additions, refuse_labels
from training.run.edge import Written
from training.run.finetune import starting_encoder
from training.run.pinned import refuse_unfit
from training.tracking.tracker import FINETUNE_METRICS


def run_finetune(
    folder: RunFolder,
    config: RunConfig,
    encoder: str | None,
    say: Say,
    *,
    backend: Backend = ON_RAY,
) -> None:
    """Fine-tune the folder's encoder (or another one) into `classifier/`.

    Raises: ConfigMismatch if the folder holds fine-tuning with other settings; TrainingError for
        clips with more labels than the loss can use.
    """
    data = pin_for(folder, config)
    # Pretraining is for all clips, fine-tuning for those of them that have a label.
    train = with_labels(data.train, "finetune")
    refuse_labels(train, config.finetune.loss)
    has_own = folder.place.exists("encoder/encoder.json")
    if encoder is None and not has_own:
        refuse_unfit(config, data.snapshot.spec)
    own = folder.place.uri_of("encoder") if has_own else config.encoder.init
    config, statistics = settle(folder, config, data, say, encoder or own)
    if "statistics" not in folder.record:
        folder.write_record(statistics=statistics)
    plan = BatchPlan.of_finetuning(len(train), config)
    reads = {"--store": data.snapshot.uri, "--encoder": encoder}
    backend.ready(training_demands(config, None), reads, folder.uri, config.scale)
    handle = backend.attach(folder, config, data, say)
    origin = provenance(folder, config)
    folder.check()
    uri = starting_encoder(config, train, encoder, folder.place, origin)
    _say_what_is_trained(config, train, len(data.train), uri, say)
    total = plan.steps(len(train)) * config.finetune.epochs
    started = time.monotonic()
    written = Written(folder.place, origin, folder.attempt)
    stage = partial(backend.finetune, config, train, uri, written)
    nodes = backend.watched_nodes(folder.attempt, handle, config.tracking.of_nodes(handle.uri))
    with nodes, watched(folder.place, FINETUNE_METRICS, total, "finetune"):
        with_status(folder, handle, config, stage, FINETUNE_METRICS, section="finetune")
    folder.write_results(seconds={"finetune": round(time.monotonic() - started, 2)})


def _say_what_is_trained(
    config: RunConfig, train: RowIndex, n_clips: int, encoder: str, say: Say
) -> None:
    say(
        f"finetune  {len(train):,} labelled of {n_clips:,} clips, "
        f"{len(train.classes)} classes, from {encoder}"
    )
    for line in idle_additions(config.finetune):
        say(f"warning   {line}")
