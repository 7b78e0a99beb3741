"""pretrain: the `Pretrainer` on a Ray cluster, one per worker, a clustering pool beside them.

The edge between the pure `Pretrainer` and Ray Train, the actor pool, MLflow and the run folder.
Invariant: everything that can be wrong with a run is said before the cluster is used, and a run
that died anywhere goes on from its newest checkpoint when the same command is given again.
"""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clustering.config import KMeansConfig, PoolConfig
from clustering.kmeans.label_table import LabelTable
from clustering.pool.pool import ClusterPool
from clustering.rounds.files import is_complete, round_uri
from clustering.rounds.protocol import Rounds
from pipeline.quality.leave_out import LeftOut, left_out
from pipeline.store.store import FeatureStore, Snapshot
from training.attempt import UNHELD, Attempt
from training.config import TrainingConfig
from training.data.order import BatchPlan, WindowPlan, lanes_of
from training.data.rows import RowIndex, index_rows
from training.data.validation import groups_of, split_validation
from training.errors import TOO_OLD, TrainingError
from training.loop.controls import control_labels
from training.loop.hooks import Hooks, World
from training.loop.pretrainer import Pretrainer
from training.model.encoder import Encoder
from training.model.make import input_shape, make_encoder
from training.on_ray import fit as ray_fit
from training.on_ray.reader import RayReader
from training.tracking.copier import RunHandle
from training.tracking.tracker import Tracker
from training.weights.files import load_weights, save_encoder

log = logging.getLogger(__name__)

CHECKPOINTS = "pretrain"
"""Folder of the run that holds the checkpoints of pretraining."""
_SAVED_BANKS = 3
"""Of the two checkpoints that are kept, and of the one that is being written."""


class Pinned(NamedTuple):
    """The data of a run: one version of a store."""

    snapshot: Snapshot
    train: RowIndex
    validation: RowIndex | None = None
    """Clips that `data.validation_frac` keeps out of training."""
    left_out: LeftOut | None = None
    """Train clips that rules keep out of both."""


class Span(NamedTuple):
    """The part of a run's steps to take: runs that differ later can share their first epochs."""

    start: Path | None = None
    """Checkpoint of another run to go on from, while this one has none of its own."""
    until_epoch: int | None = None
    """Stop after this many epochs, before the round that follows them."""


WHOLE = Span()


def pin(
    store: str, version: int | None, config: TrainingConfig, known: LeftOut | None = None
) -> Pinned:
    """Open a version of a store and index its train split, without what `data.leave_out` names.

    Args: known: what the run left out when it began; None: as the rules have it now.
    Raises: StoreError, TrainingError; SourceError for a rule that there is not.
    """
    snapshot = FeatureStore.open(store).snapshot(version)
    index = index_rows(snapshot, "train")
    if config.data.leave_out and known is None:
        known = left_out(snapshot, "train", config.data.leave_out)
    kept_N = np.ones(len(index), bool)
    if known is not None:
        kept_N = ~np.isin(index.clip_ids_N, known.clips["clip_id"].to_pylist())
        index = index.take(kept_N)
    if config.data.validation_frac > 0:
        groups_N = groups_of(snapshot, "train")[kept_N]
        return Pinned(
            snapshot, *split_validation(index, groups_N, config.data.validation_frac), known
        )
    return Pinned(snapshot, index, left_out=known)


def check(config: TrainingConfig, clustering: KMeansConfig, data: Pinned) -> None:
    """Refuse what cannot work, before anything is started.

    Raises: TrainingError naming the keys, the values and what is allowed.
    """
    spec, n_clips = data.snapshot.spec, len(data.train)
    check_alone(config)
    BatchPlan.of(n_clips, config.pretrain.batch_size, config.data)
    if config.data.frames_per_clip > spec.n_frames:
        raise TrainingError(
            f"data.frames_per_clip = {config.data.frames_per_clip}, but the store holds "
            f"{spec.n_frames} frames a clip; lower it, or ingest with --features.n-frames"
        )
    control_labels(config.rounds.labels, data.train, clustering.k, config.seed)
    if config.rounds.labels in ("clusters", "random") and clustering.k > n_clips // 2:
        raise TrainingError(
            f"clustering.k = {clustering.k}, but the train split has {n_clips} clips; K is at most "
            "half of that (a cluster of one clip has nothing to teach), and about one to three "
            "times the number of classes works best"
        )
    try:
        with torch.device("meta"):
            Encoder(config.encoder, input_shape(spec), decoder=config.loss.reconstruction > 0)
    except ValueError as error:
        raise TrainingError(f"the encoder does not fit the store's features: {error}") from None


def check_alone(config: TrainingConfig) -> None:
    """Refuse what cannot work on any clips. Raises: TrainingError, as `check`."""
    plan = BatchPlan.of(config.pretrain.batch_size, config.pretrain.batch_size, config.data)
    lanes_of(0, config.scale.num_workers, config.data.lanes)
    _refuse_what_cannot_learn(config)
    _refuse_labels_that_never_come(config, plan.compared(config.loss.negatives))


def _refuse_labels_that_never_come(config: TrainingConfig, compared: int) -> None:
    """A run that asks for labels and gets none is InfoNCE alone under another name.

    Rounds start between epochs, the first after the warm-up and once InfoNCE, which is at least 0,
    is below ln n - margin. Args: compared: n.
    """
    rounds, epochs = config.rounds, config.pretrain.epochs
    if rounds.labels == "none":
        return
    first = max(1, rounds.warmup_epochs)
    if first >= epochs:
        raise TrainingError(
            f"rounds.warmup_epochs = {rounds.warmup_epochs} of pretrain.epochs = {epochs}: the "
            f"first round would start after {first} epochs, when nothing is left to train; lower "
            "rounds.warmup_epochs, raise pretrain.epochs, or set rounds.labels = none"
        )
    if rounds.margin_nats >= math.log(compared):
        raise TrainingError(
            f"rounds.margin_nats = {rounds.margin_nats}: labels would wait until InfoNCE among "
            f"{compared} clips falls below ln {compared} - margin = "
            f"{math.log(compared) - rounds.margin_nats:.2f}, and it is never below 0; set "
            f"rounds.margin_nats well below {math.log(compared):.2f}, such as 0.25"
        )


def _refuse_what_cannot_learn(config: TrainingConfig) -> None:
    """Patches from nothing stay on InfoNCE's plateau ln B, and the first labels wait for its end.

    Such a run costs all its GPU hours and says no more than a warning. With a negative margin
    nothing waits: labels teach from the start.
    """
    loss, rounds = config.loss, config.rounds
    helped = config.encoder.init is not None or loss.reconstruction > 0 or loss.intra > 0
    if (
        config.encoder.stem == "conv"
        or helped
        or (rounds.labels != "none" and rounds.margin_nats < 0)
    ):
        return
    raise TrainingError(
        "encoder.stem = patch learns nothing from InfoNCE alone when it starts from nothing: give "
        "weights with --init URI (CAV-MAE or MAE ViT), or set loss.reconstruction = 1 (CAV-MAE's "
        "masked reconstruction) or loss.intra = 1, or take encoder.stem = conv"
    )


def pretrain(
    config: TrainingConfig,
    clustering: KMeansConfig,
    data: Pinned,
    out: Path,
    handle: RunHandle,
    provenance: dict[str, Any],
    *,
    pool: PoolConfig,
    span: Span = WHOLE,
    attempt: Attempt = UNHELD,
) -> dict[str, Any]:
    """Train on the cluster Ray is connected to. Returns: the last metrics and times.

    Raises: TrainingError; ClusteringError.
    """
    import ray

    actors: ClusterPool | None = None
    rounds: Rounds | None = None
    if config.rounds.labels != "none":
        where = str(out / "rounds")
        actors = _actors(config, clustering, pool, data.train, where, attempt=attempt)
        rounds = actors.client()
    settings = {
        "config": ray_fit.for_workers(config),
        "index": [ray.put(data.train)],
        "rounds": rounds,
        "out": str(out),
        "handle": tuple(handle),
        "provenance": provenance,
        "span": tuple(span),
        "attempt": tuple(attempt),
    }
    try:
        result = ray_fit.fit(_loop, settings, out, CHECKPOINTS, config.scale, attempt=attempt)
    finally:
        if actors is not None:
            actors.close()
    return dict(result or {})


def _actors(
    config: TrainingConfig,
    clustering: KMeansConfig,
    pool: PoolConfig,
    train: RowIndex,
    uri: str,
    *,
    attempt: Attempt,
) -> ClusterPool:
    widths: dict[str, int] = {s: config.encoder.projection for s in config.loss.label_streams}
    control = control_labels(config.rounds.labels, train, clustering.k, config.seed)
    if control is None:
        return ClusterPool(clustering, pool, widths, uri, config.seed, may_write=attempt.check)
    with_k = clustering.model_copy(update={"k": control.k})
    given = LabelTable(control.keys_N, control.labels_N)
    return ClusterPool(with_k, pool, widths, uri, config.seed, given=given, may_write=attempt.check)


def _loop(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What every worker runs."""
    import ray

    config = TrainingConfig.model_validate(settings["config"])
    world = ray_fit.this_world(config.scale)
    index: RowIndex = ray.get(settings["index"][0])
    rounds: Rounds | None = settings["rounds"]
    out = Path(settings["out"])
    span = Span(*settings["span"])
    attempt = Attempt(*settings["attempt"])
    state = _starting_state(span, out, rounds if world.rank == 0 else None)
    encoder = _starting_encoder(config, index, state)
    handle = RunHandle(*settings["handle"])
    tracker = ray_fit.tracker_for(world, handle, out / "metrics.jsonl", state, attempt=attempt)
    trainer = Pretrainer(
        config,
        encoder,
        index,
        reader=_reader(config, index, world),
        rounds=rounds,
        world=world,
        hooks=_hooks(config, rounds, world, out, tracker=tracker, attempt=attempt),
    )
    last = trainer.run(state, span.until_epoch)
    if tracker is None:
        return None
    attempt.check()
    save_encoder(
        encoder,
        str(out / "encoder"),
        index.classes,
        index.spec.model_dump(mode="json"),
        settings["provenance"],
        statistics=config.data.statistics,
    )
    tracker.close()
    return {"metrics": last, "steps": trainer.step, "clustering_s": trainer.labelling.waited_s}


def _starting_state(span: Span, out: Path, restored: Rounds | None) -> dict[str, Any] | None:
    """The newest checkpoint of this run, else the one it branches off from.

    Args: restored: gets the rows of its bank.
    """
    state = ray_fit.last_state()
    if state is None and span.start is not None:
        state = ray_fit.state_in(span.start)
    if state is None:
        return None
    refuse_lost_labels(state, str(out / "rounds"))
    if restored is not None and state["bank"]:
        restored.restore(state["bank"])
    return state


def refuse_lost_labels(state: dict[str, Any], uri: str) -> None:
    """Raises: TrainingError if the labels a checkpoint goes on with are not among the rounds.

    Asked for all the same, they would be waited for until `rounds.timeout_s`, half an hour.
    """
    labelling = state["labelling"]
    if "confusion" not in labelling:
        raise TrainingError(TOO_OLD)
    number = labelling["round"]
    if labelling["confusion"] and not is_complete(uri, number):
        raise TrainingError(
            f"{round_uri(uri, number)}: the checkpoint of step {state['step']} goes on with the "
            f"labels of round {number}, which are not there any more. Copy the folder back, or "
            "give --fresh to start again"
        )


def _starting_encoder(
    config: TrainingConfig, index: RowIndex, state: dict[str, Any] | None
) -> Encoder:
    encoder = make_encoder(config, index.spec)
    if state is None and config.encoder.init is not None:
        log.info("weights: %s", load_weights(encoder, config.encoder.init))
    return encoder


def _reader(config: TrainingConfig, index: RowIndex, world: World) -> RayReader:
    plan = BatchPlan.of(len(index), config.pretrain.batch_size, config.data)
    lanes = lanes_of(world.rank, world.size, plan.lanes)
    windows = WindowPlan(index, plan, lanes, config.seed)
    return RayReader(windows, config.scale.reader_tasks, config.scale.reader_cpus)


def _hooks(
    config: TrainingConfig,
    rounds: Rounds | None,
    world: World,
    out: Path,
    *,
    tracker: Tracker | None,
    attempt: Attempt,
) -> Hooks:
    keeps_bank = rounds is not None and config.rounds.features == "train"

    def save(state: dict[str, Any]) -> None:
        attempt.check()
        state["bank"] = ""
        if keeps_bank:
            state["bank"] = str(out / "rounds" / f"bank-{state['step']:08d}")
            _save_bank(rounds, state["bank"], world, config.rounds.timeout_s)
        ray_fit.report_state(state, world.rank, attempt)

    def write(step: int, metrics: dict[str, float]) -> None:
        if tracker is not None:
            tracker.log(step, metrics)

    keep = ray_fit.failure_writer(out, world.rank, attempt)
    return Hooks(write, save, keep, ray_fit.leaving_notice())


def _save_bank(rounds: Rounds | None, uri: str, world: World, timeout_s: float) -> None:
    """Save the live rows of the bank, and drop what no kept checkpoint points at."""
    assert rounds is not None
    rounds.flush(timeout_s)
    world.barrier()
    if world.rank == 0:
        rounds.save(uri)
        rounds.forget_saved(_SAVED_BANKS)
    world.barrier()
