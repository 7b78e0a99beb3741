"""The fine-tuning stage: `encoder/` of a run folder to its `classifier/`.

Knows nothing of pretraining. Invariant: the same call goes on from the newest checkpoint.
"""

import time
from functools import partial

from diccae.config import RunConfig
from diccae.fresh import Anew, has_begun
from diccae.resources import training_demands
from diccae.run_folder import RunFolder, watched
from diccae.stages.backend import ON_RAY, Backend
from diccae.stages.run_record import (
    Say,
    begin_another_tracking_run,
    pin_for,
    provenance,
    with_status,
)
from diccae.stages.statistics import settle
from training.data.order import BatchPlan
from training.data.rows import RowIndex, with_labels
from training.loop.finetuner import idle_additions, refuse_labels
from training.run.checkpoints import newest_checkpoint
from training.run.edge import Written
from training.run.finetune import (
    CHECKPOINTS,
    forget_finetuning,
    settings_digest,
    starting_encoder,
)
from training.run.pinned import Pinned, refuse_unfit
from training.tracking.tracker import FINETUNE_METRICS

_SETTINGS = "fine_tuned_with"
"""Of run.json: digest of what decides the result of the last fine-tuning that began."""


def run_finetune(
    folder: RunFolder,
    config: RunConfig,
    encoder: str | None,
    say: Say,
    *,
    backend: Backend = ON_RAY,
    anew: Anew | None = None,
) -> None:
    """Fine-tune the folder's encoder (or another one) into `classifier/`.

    Args: anew: delete the classifier that is there, once nothing is refused any more.
    Raises: ConfigMismatch if the folder holds fine-tuning with other settings; TrainingError for
        clips with more labels than the loss can use.
    """
    asked = config
    config, data, train, total = _looked_at(folder, config, encoder, say, backend)
    if anew is not None:
        _forget(folder, asked, say)
        has_begun(folder, anew)
    elif _has_points_of_other_settings(folder, config, encoder):
        begin_another_tracking_run(folder, asked, say)
        folder.place.remove(FINETUNE_METRICS)
    handle = backend.attach(folder, config, data, say)
    origin = provenance(folder, config)
    folder.check()
    uri = starting_encoder(config, train, encoder, folder.place, origin)
    folder.write_record(**{_SETTINGS: settings_digest(config, uri)})
    _say_what_is_trained(config, train, len(data.train), uri, say)
    started = time.monotonic()
    written = Written(folder.place, origin, folder.attempt)
    stage = partial(backend.finetune, config, train, uri, written)
    nodes = backend.watched_nodes(folder.attempt, handle, config.tracking.of_nodes(handle.uri))
    with nodes, watched(folder.place, FINETUNE_METRICS, total, "finetune"):
        with_status(folder, handle, config, stage, FINETUNE_METRICS, section="finetune")
    folder.write_results(seconds={"finetune": round(time.monotonic() - started, 2)})


def _looked_at(
    folder: RunFolder, config: RunConfig, encoder: str | None, say: Say, backend: Backend
) -> tuple[RunConfig, Pinned, RowIndex, int]:
    """The config with its statistics, the data, its clips that have a label, and the number of
    steps, once nothing is refused any more."""
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
    steps = BatchPlan.of_finetuning(len(train), config).steps(len(train))
    reads = {"--store": data.snapshot.uri, "--encoder": encoder}
    backend.ready(training_demands(config, None), reads, folder.uri, config.scale)
    return config, data, train, steps * config.finetune.epochs


def _forget(folder: RunFolder, config: RunConfig, say: Say) -> None:
    """Delete the classifier; the folder takes over the config, which tells of the one that is
    there."""
    folder.check()
    folder.open(config, fresh=False)
    if folder.place.exists(FINETUNE_METRICS):
        # First: by this file another attempt knows that MLflow has its points.
        begin_another_tracking_run(folder, config, say)
    forget_finetuning(folder.place)


def _has_points_of_other_settings(
    folder: RunFolder, config: RunConfig, encoder: str | None
) -> bool:
    """Whether an earlier start with other settings got as far as curves, and to no checkpoint:
    training begins at step 0, and MLflow keeps the points that it has."""
    place, known = folder.place, folder.record.get(_SETTINGS)
    if known is None or not place.exists(FINETUNE_METRICS) or newest_checkpoint(place, CHECKPOINTS):
        return False
    return bool(known != settings_digest(config, encoder or place.uri_of("encoder")))


def _say_what_is_trained(
    config: RunConfig, train: RowIndex, n_clips: int, encoder: str, say: Say
) -> None:
    say(
        f"finetune  {len(train):,} labelled of {n_clips:,} clips, "
        f"{len(train.classes)} classes, from {encoder}"
    )
    for line in idle_additions(config.finetune):
        say(f"warning   {line}")
