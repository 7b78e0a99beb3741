"""Pretraining on a Ray cluster: a trainer per worker, a clustering pool beside them.

The edge between the pure `Pretrainer` and Ray Train, the actor pool, MLflow and the run folder.
Invariant: everything that can be wrong with a run is said before the cluster is used, and a run
that died anywhere goes on from its newest checkpoint when the same command is given again.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clustering.config import ClusteringConfig
from clustering.pool.pool import ClusterPool
from clustering.rounds.protocol import Rounds
from pipeline.config import FeatureSpec
from pipeline.quality.leave_out import LeftOut, left_out
from pipeline.store.store import FeatureStore, Snapshot
from training.config import TrainingConfig
from training.data.batches import BatchPlan, RowIndex, index_rows, lanes_of, split_validation
from training.data.reader import RayReader, WindowPlan
from training.errors import TrainingError
from training.loop.controls import control_labels
from training.loop.pretrainer import Hooks, Pretrainer, World, barrier
from training.model.encoder import Encoder, InputShape
from training.on_ray import fit as ray_fit
from training.tracking.tracker import RunHandle, Tracker
from training.weights.files import load_weights, save_encoder

log = logging.getLogger(__name__)

CHECKPOINTS = "pretrain"
"""Folder of the run that holds the checkpoints of pretraining."""


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
    if known is not None:
        index = index.take(~np.isin(index.clip_ids_N, known.clips["clip_id"].to_pylist()))
    if config.data.validation_frac > 0:
        return Pinned(snapshot, *split_validation(index, config.data.validation_frac), known)
    return Pinned(snapshot, index, left_out=known)


def input_shape(spec: FeatureSpec) -> InputShape:
    """What the encoder sees of features of this spec."""
    return InputShape(spec.fbank_frames, spec.n_mels, spec.frame_size)


def check(config: TrainingConfig, clustering: ClusteringConfig, data: Pinned) -> None:
    """Refuse what cannot work, before anything is started.

    Raises: TrainingError naming the keys, the values and what is allowed.
    """
    spec, n_clips = data.snapshot.spec, len(data.train)
    BatchPlan.of(n_clips, config.pretrain.batch_size, config.data)
    lanes_of(0, config.scale.num_workers, config.data.lanes)
    if config.data.frames_per_clip > spec.n_frames:
        raise TrainingError(
            f"data.frames_per_clip = {config.data.frames_per_clip}, but the store holds "
            f"{spec.n_frames} frames a clip; lower it, or ingest with --features.n-frames"
        )
    control_labels(config.rounds.labels, data.train, clustering.k, config.seed)
    if config.rounds.labels != "none" and clustering.k > n_clips:
        raise TrainingError(
            f"clustering.k = {clustering.k}, but the train split has {n_clips} clips; K is at most "
            "that, and about one to three times the number of classes works best"
        )
    try:
        with torch.device("meta"):
            Encoder(config.encoder, input_shape(spec), decoder=config.loss.reconstruction > 0)
    except ValueError as error:
        raise TrainingError(f"the encoder does not fit the store's features: {error}") from None


def pretrain(
    config: TrainingConfig,
    clustering: ClusteringConfig,
    data: Pinned,
    out: Path,
    handle: RunHandle,
    provenance: dict[str, Any],
    span: Span = WHOLE,
) -> dict[str, Any]:
    """Train on the cluster Ray is connected to. Returns: the last metrics and times.

    Raises: TrainingError; ClusteringError.
    """
    import ray

    pool: ClusterPool | None = None
    rounds: Rounds | None = None
    if config.rounds.labels != "none":
        pool = _pool(config, clustering, data.train, str(out / "rounds"))
        rounds = pool.client()
    settings = {
        "config": ray_fit.for_workers(config),
        "index": [ray.put(data.train)],
        "rounds": rounds,
        "out": str(out),
        "handle": tuple(handle),
        "provenance": provenance,
        "span": tuple(span),
    }
    try:
        result = ray_fit.fit(_loop, settings, out, CHECKPOINTS, config.scale)
    finally:
        if pool is not None:
            pool.close()
    return dict(result or {})


def _pool(
    config: TrainingConfig, clustering: ClusteringConfig, train: RowIndex, uri: str
) -> ClusterPool:
    widths: dict[str, int] = {s: config.encoder.projection for s in config.loss.label_streams}
    control = control_labels(config.rounds.labels, train, clustering.k, config.seed)
    if control is None:
        return ClusterPool(clustering, widths, uri, config.seed)
    with_k = clustering.model_copy(update={"k": control.k})
    return ClusterPool(with_k, widths, uri, config.seed, (control.keys_N, control.labels_N))


def _loop(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What every worker runs."""
    import ray

    config = TrainingConfig.model_validate(settings["config"])
    world = ray_fit.this_world(config.scale)
    index: RowIndex = ray.get(settings["index"][0])
    rounds: Rounds | None = settings["rounds"]
    out = Path(settings["out"])
    span = Span(*settings["span"])
    state = ray_fit.last_state()
    if state is None and span.start is not None:
        state = ray_fit.state_in(span.start)
    encoder = make_encoder(config, index.spec)
    if state is None and config.encoder.init is not None:
        log.info("weights: %s", load_weights(encoder, config.encoder.init))
    if state is not None and rounds is not None and state["bank"] and world.rank == 0:
        rounds.restore(state["bank"])
    tracker = None
    if world.rank == 0:
        step = 0 if state is None else int(state["step"])
        tracker = Tracker(RunHandle(*settings["handle"]), out / "metrics.jsonl", step)
    trainer = Pretrainer(
        config,
        encoder,
        index,
        _reader(config, index, world),
        rounds,
        world,
        _hooks(config, rounds, world, out, tracker),
    )
    last = trainer.run(state, span.until_epoch)
    if world.rank != 0:
        return None
    save_encoder(
        encoder,
        str(out / "encoder"),
        index.classes,
        index.spec.model_dump(mode="json"),
        settings["provenance"],
        statistics=config.data.statistics,
    )
    assert tracker is not None
    tracker.close()
    return {"metrics": last, "steps": trainer.step, "clustering_s": trainer.clustering_s}


def make_encoder(config: TrainingConfig, spec: FeatureSpec) -> Encoder:
    """A new encoder, the same on every worker."""
    torch.manual_seed(config.seed)
    return Encoder(config.encoder, input_shape(spec), decoder=config.loss.reconstruction > 0)


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
    tracker: Tracker | None,
) -> Hooks:
    keeps_bank = rounds is not None and config.rounds.features == "train"

    def save(state: dict[str, Any]) -> None:
        state["bank"] = ""
        if keeps_bank:
            state["bank"] = str(out / "rounds" / f"bank-{state['step']:08d}")
            _save_bank(rounds, Path(state["bank"]), world, config.rounds.timeout_s)
        ray_fit.report_state(state, world.rank)

    def write(step: int, metrics: dict[str, float]) -> None:
        if tracker is not None:
            tracker.log(step, metrics)

    return Hooks(write, save, failure_writer(out, world.rank), ray_fit.leaving_notice())


def failure_writer(out: Path, rank: int) -> Callable[[dict[str, Any]], str]:
    """Keeps what is needed to replay a step whose loss was not finite."""

    def write(content: dict[str, Any]) -> str:
        path = out / "failed" / f"step-{content['step']}-rank-{rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
        return str(path)

    return write


def _save_bank(rounds: Rounds | None, folder: Path, world: World, timeout_s: float) -> None:
    """Write the live rows of the bank, and drop those no kept checkpoint points at."""
    assert rounds is not None
    rounds.flush(timeout_s)
    barrier(world)
    if world.rank == 0:
        rounds.save(str(folder))
        for old in sorted(folder.parent.glob("bank-*"))[:-3]:
            shutil.rmtree(old, ignore_errors=True)
    barrier(world)
