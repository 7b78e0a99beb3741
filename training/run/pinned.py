"""Pinned, the clips of a run at one version of a store, and what is refused before it starts.

Knows nothing of where a run is computed. Invariant: everything that can be wrong with a run is said
by `check`, before anything is started.
"""

import math
from typing import NamedTuple

import numpy as np

from pipeline.config import FeatureSpec
from pipeline.quality.leave_out import LeftOut, left_out
from pipeline.store.store import FeatureStore, Snapshot
from training.config import TrainingConfig
from training.data.order import BatchPlan, lanes_of
from training.data.rows import RowIndex, index_rows
from training.data.validation import groups_of, split_validation
from training.errors import TrainingError
from training.loop.labelling import lead_steps
from training.model.encoder import Encoder
from training.model.make import input_shape
from training.run.known_labels import known_labels


class Pinned(NamedTuple):
    """The data of a run: one version of a store."""

    snapshot: Snapshot
    train: RowIndex
    validation: RowIndex | None = None
    """Clips that `data.validation_frac` keeps out of training."""
    left_out: LeftOut | None = None
    """Train clips that rules keep out of both."""


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


def check(config: TrainingConfig, data: Pinned) -> None:
    """Refuse what cannot work, before anything is started.

    Raises: TrainingError naming the keys, the values and what is allowed.
    """
    spec, n_clips = data.snapshot.spec, len(data.train)
    check_alone(config)
    plan = BatchPlan.of(n_clips, config.pretrain.batch_size, config.data)
    _refuse_labels_at_the_end(config, plan.steps(n_clips))
    if config.data.frames_per_clip > spec.n_frames:
        raise TrainingError(
            f"data.frames_per_clip = {config.data.frames_per_clip}, but the store holds "
            f"{spec.n_frames} frames a clip; lower it, or ingest with --features.n-frames"
        )
    k = config.clustering.k
    known_labels(config.rounds, data.train, k, config.seed)
    if config.rounds.labels in ("clusters", "random") and k > n_clips // 2:
        raise TrainingError(
            f"clustering.k = {k}, but the train split has {n_clips} clips; K is at most "
            "half of that (a cluster of one clip has nothing to teach), and about one to three "
            "times the number of classes works best"
        )
    refuse_unfit(config, spec)


def refuse_unfit(config: TrainingConfig, spec: FeatureSpec) -> None:
    """Raises: TrainingError for an encoder that cannot be made for such features."""
    try:
        # Blocks take whatever the stems give. Not on the meta device, where drawing a weight makes
        # torch import its compiler, 2 s of each start.
        no_blocks = {"depth": 0, "joint_depth": 0, "decoder_depth": 0}
        shallow = config.encoder.model_copy(update=no_blocks)
        Encoder(shallow, input_shape(spec), decoder=config.loss.reconstruction > 0)
    except ValueError as error:
        raise TrainingError(f"the encoder does not fit the store's features: {error}") from None


def check_alone(config: TrainingConfig) -> None:
    """Refuse what cannot work on any clips. Raises: TrainingError, as `check`."""
    plan = BatchPlan.of(config.pretrain.batch_size, config.pretrain.batch_size, config.data)
    lanes_of(0, config.scale.num_workers, config.data.lanes)
    _refuse_lanes_of_one_clip(config, plan.compared(config.loss.negatives))
    _refuse_what_cannot_learn(config)
    _refuse_labels_that_never_come(config, plan.compared(config.loss.negatives))


def _refuse_lanes_of_one_clip(config: TrainingConfig, compared: int) -> None:
    """InfoNCE among one clip is exactly 0, and so is its gradient. Args: compared: clips."""
    if compared > 1 or not (config.loss.instance or config.loss.intra):
        return
    batch, lanes = config.pretrain.batch_size, config.data.lanes
    raise TrainingError(
        f"loss.negatives = local compares the clips of a data lane, and pretrain.batch_size = "
        f"{batch} in data.lanes = {lanes} is one a lane, which InfoNCE learns nothing from; lower "
        f"data.lanes to {batch // 2} or less, raise pretrain.batch_size, or set loss.negatives = "
        "global"
    )


def _refuse_labels_that_never_come(config: TrainingConfig, compared: int) -> None:
    """A run that asks for labels and gets none is InfoNCE alone under another name.

    Rounds start between epochs, the first after the warm-up and, with a margin of 0 or more, once
    InfoNCE, which is at least 0, is below ln n - margin. Args: compared: n.
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
    if rounds.margin_nats >= 0 and config.loss.instance == 0:
        raise TrainingError(
            f"loss.instance = 0 with rounds.labels = {rounds.labels}: labels wait until InfoNCE "
            f"falls below ln {compared} - rounds.margin_nats = {rounds.margin_nats}, and nothing "
            "trains it; set rounds.margin_nats below 0, such as -1, for labels that do not wait, "
            "loss.instance above 0, or rounds.labels = none"
        )


def _refuse_labels_at_the_end(config: TrainingConfig, steps_per_epoch: int) -> None:
    """The same where the first labels would come when at most one step is left: none are made."""
    rounds, epochs = config.rounds, config.pretrain.epochs
    first = max(1, rounds.warmup_epochs) * steps_per_epoch
    latest = steps_per_epoch * epochs - 2
    applies = first + lead_steps(rounds, steps_per_epoch)
    if rounds.labels == "none" or applies <= latest:
        return
    lower = f", or lower rounds.lead_steps to {latest - first} or less" if first <= latest else ""
    raise TrainingError(
        f"rounds.lead_steps = {rounds.lead_steps}: the first round starts after {first} steps and "
        f"its labels would apply after {applies}, of {steps_per_epoch * epochs} in all "
        f"({steps_per_epoch} an epoch); raise pretrain.epochs = {epochs}{lower}"
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
