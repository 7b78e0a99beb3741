"""WindowPlan: which clips make up which step, and which of them a worker reads together.

Pure numpy over a `RowIndex`: knows nothing of features, Ray or models. Invariant: the clips of
step s of epoch e are a function of (rows, seed, e, s) alone. Lanes fix which share of a batch a
worker reads, so the order never depends on the number of workers, and a run can be taken up at any
step.

Shapes: N clips, B global batch, V lanes, b = B / V clips of a lane, S steps of a window, n clips of
a worker's step, W distinct clips of a window, L labels of a clip, G row groups.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import FeatureSpec
from pipeline.store.schema import ROW_GROUP_ROWS
from training.config import DataConfig, TrainingConfig
from training.data.rows import RowIndex
from training.errors import TrainingError

Draws = Callable[[int], NDArray[np.int64]]
"""Epoch to the positions in a `RowIndex` it visits, doubles allowed."""


class FrameDraw(NamedTuple):
    """Which stored frames of a clip a batch carries."""

    frames_per_clip: int
    n_views: int = 1
    """Independent draws per clip (2 for intra-modal views)."""
    random: bool = True
    """False takes the middle frame of each segment, the same every time."""


class EpochReads(NamedTuple):
    """What is read of one epoch."""

    epoch: int
    first_step: int
    frames: FrameDraw


class Window(NamedTuple):
    """One piece of reading: the clips of some consecutive steps for the lanes of a worker.

    It carries what a reader needs and nothing of the other clips: with the whole index, each
    reading task of a store of 2 million clips spent 0.58 s on unpickling it.
    """

    store_uri: str
    spec: FeatureSpec
    shards: list[str]
    """Those with a clip of this window."""
    shard_W: NDArray[np.int64]
    """Position in `shards` of each distinct clip."""
    row_W: NDArray[np.int32]
    position_W: NDArray[np.int64]
    """In the `RowIndex`."""
    key_W: NDArray[np.uint64]
    labels_WL: NDArray[np.int32]
    places_Sn: NDArray[np.int64]
    """Which of the distinct clips each step takes, lane after lane."""
    visits_Sn: NDArray[np.int64]
    """How often the epoch took that clip before, on any worker."""
    frames: FrameDraw
    seed: int
    epoch: int

    @property
    def positions_Sn(self) -> NDArray[np.int64]:
        """Positions in the `RowIndex` of each step."""
        return self.position_W[self.places_Sn]


def window_of(
    index: RowIndex,
    positions_Sn: NDArray[np.int64],
    frames: FrameDraw,
    seed: int = 0,
    epoch: int = 0,
    *,
    visits_Sn: NDArray[np.int64] | None = None,
) -> Window:
    """The clips at these positions as a reader wants them.

    Args: seed, epoch, visits_Sn: of random frames; no visits: each clip for the first time.
    """
    wanted_W, places = np.unique(positions_Sn, return_inverse=True)
    shards, shard_W = np.unique(index.shards_N[wanted_W], return_inverse=True)
    return Window(
        store_uri=index.store_uri,
        spec=index.spec,
        shards=[index.shards[i] for i in shards],
        shard_W=shard_W,
        row_W=index.rows_N[wanted_W],
        position_W=wanted_W,
        key_W=index.keys_N[wanted_W],
        labels_WL=index.labels_NL[wanted_W],
        places_Sn=places.reshape(positions_Sn.shape),
        visits_Sn=np.zeros(positions_Sn.shape, np.int64) if visits_Sn is None else visits_Sn,
        frames=frames,
        seed=seed,
        epoch=epoch,
    )


class BatchPlan(NamedTuple):
    """How a split is cut into batches."""

    batch_size: int
    lanes: int
    window_steps: int
    """Steps whose clips are permuted together."""

    @classmethod
    def of(
        cls, n_clips: int, batch_size: int, data: DataConfig, key: str = "pretrain.batch_size"
    ) -> "BatchPlan":
        """Raises: TrainingError if the batch does not divide into lanes, or exceeds the clips."""
        if batch_size % data.lanes:
            raise TrainingError(
                f"{key} = {batch_size} does not divide into data.lanes = {data.lanes}; "
                "choose a multiple"
            )
        if n_clips < batch_size:
            raise TrainingError(
                f"{key} = {batch_size}, but the split has only {n_clips} clips; lower it or ingest "
                "more clips"
            )
        return cls(batch_size, data.lanes, max(1, data.shuffle_window * data.lanes // batch_size))

    @classmethod
    def of_finetuning(cls, n_clips: int, config: TrainingConfig) -> "BatchPlan":
        """In as many of the lanes of pretraining as divide the batch: there they are fixed by then.

        Raises: TrainingError if workers are more than these, or clips fewer than the batch.
        """
        batch_size, data = config.finetune.batch_size, config.data
        lanes = math.gcd(batch_size, data.lanes)
        if config.scale.num_workers > lanes:
            raise TrainingError(
                f"finetune.batch_size = {batch_size} divides into {lanes} of data.lanes = "
                f"{data.lanes}, too few for scale.num_workers = {config.scale.num_workers}, each "
                f"reads at least one; make finetune.batch_size a multiple of {data.lanes}, or "
                f"scale.num_workers {lanes} or less"
            )
        fewer = data.model_copy(update={"lanes": lanes})
        return cls.of(n_clips, batch_size, fewer, "finetune.batch_size")

    @property
    def lane_size(self) -> int:
        """Clips of a batch in one lane, b."""
        return self.batch_size // self.lanes

    def compared(self, negatives: str) -> int:
        """Clips that InfoNCE compares: of the whole batch, or of a lane (`local`)."""
        return self.batch_size if negatives == "global" else self.lane_size

    def rows_of_workers(self, world_size: int) -> tuple[int, ...]:
        """Clips of a batch that each worker reads."""
        b = self.lane_size
        return tuple(b * len(lanes_of(r, world_size, self.lanes)) for r in range(world_size))

    def steps(self, n_clips: int) -> int:
        """Steps of one epoch; the last partial batch is left to another epoch's order."""
        return n_clips // self.batch_size


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The lanes a worker reads: consecutive ones, of which workers hold equally many, or one more.

    Raises: TrainingError if there are more workers than lanes.
    """
    if world_size > lanes:
        raise TrainingError(
            f"data.lanes = {lanes} are too few for {world_size} workers, each reads at least one; "
            "raise data.lanes (it divides the batch size) or lower scale.num_workers"
        )
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


def epoch_order(
    index: RowIndex,
    plan: BatchPlan,
    seed: int,
    epoch: int,
    draws_N: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Positions in `index` of every step of an epoch, [steps, V, b].

    Row groups are shuffled, clips within each, then clips within a lane's part of a window: reading
    goes from row group to row group. Args: draws_N: positions to visit instead of each row once
    (balanced sampling). A clip that is drawn k times is visited k times within one window: spread
    over the epoch, the draws of a window would lie in as many row groups, each of which is read
    whole (60 times the bytes, for VGGSound).
    """
    rng = np.random.default_rng([seed, epoch, 0x5EED])
    group_N = row_groups(index)
    rank_G = rng.permutation(group_N.max() + 1)
    visited_N = np.arange(len(index)) if draws_N is None else draws_N
    # Within a row group, too: else a store of one would leave the same clips out of every epoch.
    place_N = rng.permutation(len(index))
    sequence = visited_N[np.lexsort((place_N[visited_N], rank_G[group_N[visited_N]]))]
    steps, b = plan.steps(len(sequence)), plan.lane_size
    order = np.empty((steps, plan.lanes, b), np.int64)
    for first in range(0, steps, plan.window_steps):
        m = min(plan.window_steps, steps - first)
        start = first * plan.batch_size
        window = sequence[start : start + m * plan.batch_size].reshape(plan.lanes, m * b)
        shuffled = rng.permuted(window, axis=1)
        order[first : first + m] = shuffled.reshape(plan.lanes, m, b).transpose(1, 0, 2)
    return order


def visits_before(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each entry of an epoch's order came before, in the shape of the order."""
    flat = order.ravel()
    grouped = flat.argsort(kind="stable")
    first = np.searchsorted(flat[grouped], flat[grouped])
    visits = np.empty_like(flat)
    visits[grouped] = np.arange(len(flat)) - first
    return visits.reshape(order.shape)


def row_groups(index: RowIndex) -> NDArray[np.int64]:
    """Each row's Parquet row group, the smallest piece worth reading: [N] in 0..G-1."""
    shard_and_group_N = index.shards_N.astype(np.int64) << 32 | index.rows_N // ROW_GROUP_ROWS
    group_N: NDArray[np.int64] = np.unique(shard_and_group_N, return_inverse=True)[1]
    return group_N


def classes_together(index: RowIndex) -> tuple[float, float]:
    """Mean number of classes in a row group, and what it would be of clips drawn by chance; both 0
    without labels.

    A lane reads whole row groups: where the first number is far below the second, clips of a class
    are each other's negatives more often than chance has it.
    """
    known_N = index.labels_N >= 0
    if not known_N.any():
        return 0.0, 0.0
    labels_N, group_N = index.labels_N[known_N], row_groups(index)[known_N]
    n_classes, n_groups = len(index.classes), group_N.max() + 1
    found = len(np.unique(group_N * n_classes + labels_N))
    p_C = np.bincount(labels_N, minlength=n_classes) / len(labels_N)
    sizes_G = np.bincount(group_N)
    by_chance = [(1 - (1 - p_C) ** size).sum() for size in sizes_G]
    return found / n_groups, float(np.mean(by_chance))


def balanced_draws(index: RowIndex, seed: int) -> Draws:
    """Positions of an epoch drawn with replacement, inversely to the size of a clip's classes.

    Source: CAV-MAE's sampler, weight 1000 / (n_c + 0.01), summed over the labels of a clip.
    """
    labels_NL = index.labels_NL
    counts_C = np.bincount(labels_NL[labels_NL >= 0], minlength=len(index.classes))
    weights_NL = np.where(labels_NL >= 0, 1000.0 / (counts_C[labels_NL] + 0.01), 0.0)
    weights_N = weights_NL.sum(1)
    p_N = weights_N / weights_N.sum()

    def draws(epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([seed, epoch, 0xBA1])
        return rng.choice(len(index), size=len(index), p=p_N)

    return draws


class WindowPlan:
    """Cuts epochs, or a sweep over all clips, into windows for the lanes of one worker."""

    def __init__(
        self,
        index: RowIndex,
        plan: BatchPlan,
        lanes: range,
        seed: int,
        draws: Draws | None = None,
    ) -> None:
        """Args: draws: positions to visit in an epoch instead of each clip once."""
        self.index, self.plan, self.lanes, self.seed, self.draws = index, plan, lanes, seed, draws

    def windows(self, reads: EpochReads) -> Iterator[Window]:
        """Windows of an epoch from `first_step` on; the first may start inside a window."""
        draws_N = None if self.draws is None else self.draws(reads.epoch)
        order = epoch_order(self.index, self.plan, self.seed, reads.epoch, draws_N)
        # Of the whole epoch: neither the number of workers nor where reading starts counts.
        visits = np.zeros_like(order) if draws_N is None else visits_before(order)
        m = self.plan.window_steps
        for start in range(reads.first_step // m * m, len(order), m):
            steps = slice(max(start, reads.first_step), start + m)
            mine, visits_Sn = (
                part[steps, self.lanes.start : self.lanes.stop].reshape(len(part[steps]), -1)
                for part in (order, visits)
            )
            yield window_of(
                self.index, mine, reads.frames, self.seed, reads.epoch, visits_Sn=visits_Sn
            )

    def sweep(self, frames: FrameDraw) -> Iterator[Window]:
        """All clips in stored order; worker shares are contiguous and differ by at most one."""
        n, lanes = len(self.index), self.plan.lanes
        mine = np.arange(self.lanes.start * n // lanes, self.lanes.stop * n // lanes)
        per_step = self.plan.lane_size * len(self.lanes)
        for start in range(0, len(mine), per_step):
            yield window_of(self.index, mine[None, start : start + per_step], frames)
