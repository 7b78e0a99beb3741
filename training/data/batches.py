"""Which clips make up which batch, and how their stored features become arrays.

Pure but for reading the store: knows nothing of Ray, models or augmentation.
Invariant: the clips of step s of epoch e are a function of (rows, seed, e, s) alone. Lanes fix
which share of a batch a worker reads, so the order never depends on the number of workers, and a
run can be taken up at any step.

Shapes: N clips, B global batch, V lanes, b = B / V clips of a lane, F frames, R rounds of views.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import FeatureSpec
from pipeline.decode.payload import decode_jpegs, fbank_array
from pipeline.store.store import Snapshot, read_rows
from training.config import DataConfig
from training.errors import TrainingError

ROW_GROUP = 64
"""Rows of a Parquet row group: the smallest piece worth reading."""

Batch = dict[str, NDArray]


def clip_keys(clip_ids: Sequence[str]) -> NDArray[np.uint64]:
    """A stable 64-bit key per clip id, what clustering knows a clip by."""
    digests = b"".join(hashlib.blake2b(c.encode(), digest_size=8).digest() for c in clip_ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


@dataclass(frozen=True)
class RowIndex:
    """The live rows of a split at a pinned version, sorted by (shard, row)."""

    store_uri: str
    spec: FeatureSpec
    shards: list[str]
    classes: list[str]
    clip_ids_N: NDArray[np.object_]
    keys_N: NDArray[np.uint64]
    labels_N: NDArray[np.int64]
    """Position in `classes`; -1 without a label."""
    shards_N: NDArray[np.int32]
    """Position in `shards`."""
    rows_N: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.keys_N)

    def take(self, which: NDArray) -> "RowIndex":
        """The same index with only the rows `which` (positions or mask)."""
        names = [field.name for field in fields(self) if field.name.endswith("_N")]
        return replace(self, **{name: getattr(self, name)[which] for name in names})


def index_rows(snapshot: Snapshot, split: str, classes: list[str] | None = None) -> RowIndex:
    """The rows of `split` to train or test on.

    Raises: TrainingError if the split has no clip, naming the splits there are.
    """
    table = snapshot.rows(split)
    if table.num_rows == 0:
        found = {
            row["split"]: row["clip_id_count"]
            for row in snapshot.clips.group_by("split")
            .aggregate([("clip_id", "count")])
            .to_pylist()
        }
        raise TrainingError(
            f"{snapshot.uri}: no clip with usable features in split {split!r} at version "
            f"{snapshot.version}; clips by split: {found}. Ingest a CSV with that split, or see "
            f'"diccae store failures --store {snapshot.uri}".'
        )
    names = classes if classes is not None else snapshot.classes
    position = {name: i for i, name in enumerate(names)}
    shard = table["shard"].combine_chunks().dictionary_encode()
    clip_ids = table["clip_id"].to_numpy(zero_copy_only=False)
    keys = clip_keys(clip_ids)
    if len(np.unique(keys)) != len(keys):
        raise TrainingError(f"{snapshot.uri}: two clip ids share a 64-bit key; rename one of them")
    labels = [position.get(label, -1) for label in table["label"].to_pylist()]
    return RowIndex(
        snapshot.uri,
        snapshot.spec,
        shard.dictionary.to_pylist(),
        list(names),
        clip_ids,
        keys,
        np.asarray(labels, np.int64),
        shard.indices.to_numpy(zero_copy_only=False).astype(np.int32),
        pc.cast(table["row"], "int32").to_numpy(),
    )


def with_labels(index: RowIndex, purpose: str) -> RowIndex:
    """The rows that have a label. Raises: TrainingError if none has, naming who needs them."""
    known = index.labels_N >= 0
    if not known.any():
        raise TrainingError(
            f"{purpose} needs labels, and none of the {len(index)} clips of {index.store_uri} it "
            "would use has one. Ingest them with a list that has labels (diccae ingest --clips), "
            "or with --label-from-folder."
        )
    return index if known.all() else index.take(known)


class BatchPlan(NamedTuple):
    """How a split is cut into batches."""

    batch_size: int
    lanes: int
    window_steps: int
    """Steps whose clips are permuted together."""

    @classmethod
    def of(cls, n_clips: int, batch_size: int, data: DataConfig) -> "BatchPlan":
        """Raises: TrainingError if the batch does not divide into lanes, or exceeds the clips."""
        if batch_size % data.lanes:
            raise TrainingError(
                f"batch_size = {batch_size} does not divide into data.lanes = {data.lanes}; "
                "choose a multiple"
            )
        if n_clips < batch_size:
            raise TrainingError(
                f"batch_size = {batch_size}, but the split has only {n_clips} clips; lower "
                "batch_size or ingest more clips"
            )
        return cls(batch_size, data.lanes, max(1, data.shuffle_window * data.lanes // batch_size))

    def rows_of_workers(self, world_size: int) -> tuple[int, ...]:
        """Clips of a batch that each worker reads."""
        b = self.batch_size // self.lanes
        return tuple(b * len(lanes_of(r, world_size, self.lanes)) for r in range(world_size))

    def steps(self, n_clips: int) -> int:
        """Steps of one epoch; the last partial batch is left to another epoch's order."""
        return n_clips // self.batch_size


def epoch_order(
    index: RowIndex, plan: BatchPlan, seed: int, epoch: int, draws_N: NDArray | None = None
) -> NDArray[np.int64]:
    """Positions in `index` of every step of an epoch, [steps, V, b].

    Row groups are shuffled, then clips within a lane's part of a window: reading stays sequential
    within row groups. Args: draws_N: positions to visit instead of each row once (balanced
    sampling); these are shuffled freely.
    """
    rng = np.random.default_rng([seed, epoch, 0x5EED])
    if draws_N is None:
        group_N = np.unique(
            index.shards_N.astype(np.int64) << 32 | index.rows_N // ROW_GROUP, return_inverse=True
        )[1]
        rank_G = rng.permutation(group_N.max() + 1)
        sequence = np.argsort(rank_G[group_N], kind="stable")
    else:
        sequence = rng.permutation(draws_N)
    steps = plan.steps(len(sequence))
    b = plan.batch_size // plan.lanes
    order = np.empty((steps, plan.lanes, b), np.int64)
    for first in range(0, steps, plan.window_steps):
        m = min(plan.window_steps, steps - first)
        start = first * plan.batch_size
        window = sequence[start : start + m * plan.batch_size].reshape(plan.lanes, m * b)
        shuffled = rng.permuted(window, axis=1)
        order[first : first + m] = shuffled.reshape(plan.lanes, m, b).transpose(1, 0, 2)
    return order


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


class Views(NamedTuple):
    """Which stored frames a batch carries."""

    frames_per_clip: int
    n_views: int = 1
    """Independent draws per clip (2 for intra-modal views)."""
    random: bool = True
    """False takes the middle frame of each segment, the same every time."""


def choose_frames(
    keys_B: NDArray[np.uint64], n_stored: int, views: Views, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Stored frames to decode, [B, views * F]: one from each of F equal segments of the clip."""
    F = views.frames_per_clip
    edges = np.linspace(0, n_stored, F + 1)
    low, width = np.floor(edges[:-1]), np.maximum(np.diff(np.floor(edges)), 1)
    draws = np.full((len(keys_B), views.n_views, F), 0.5)
    if views.random:
        draws = _uniform(keys_B, seed, epoch, views.n_views * F).reshape(draws.shape)
    chosen = np.floor(low + draws * width).astype(np.int64)
    return np.minimum(chosen, n_stored - 1).reshape(len(keys_B), -1)


def _uniform(keys_B: NDArray[np.uint64], seed: int, epoch: int, n: int) -> NDArray[np.float64]:
    """n numbers in [0, 1) per clip, from its key, seed and epoch alone: splitmix64, [B, n]."""
    start = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    steps = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (keys_B ^ start)[:, None] + steps
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


class _Encoded:
    """Encoded features of some clips, left in Arrow memory until one is wanted."""

    def __init__(self, index: RowIndex, wanted: NDArray[np.int64]) -> None:
        """Args: wanted: positions in the index, without doubles."""
        self.frames: list[pa.ListArray] = []
        self.fbanks: list[pa.BinaryArray] = []
        self.table_W = np.empty(len(wanted), np.int64)
        self.row_W = np.empty(len(wanted), np.int64)
        shards_W = index.shards_N[wanted]
        for number, shard in enumerate(np.unique(shards_W)):
            here = np.flatnonzero(shards_W == shard)
            rows = index.rows_N[wanted[here]]
            columns = ["frames", "fbank"]
            table = read_rows(index.store_uri, index.shards[shard], rows, columns).combine_chunks()
            self.frames.append(table["frames"].chunk(0))
            self.fbanks.append(table["fbank"].chunk(0))
            self.table_W[here], self.row_W[here] = number, np.arange(len(here))

    def jpeg(self, i: int, frame: int) -> memoryview:
        """One encoded frame of the i-th clip."""
        frames = self.frames[self.table_W[i]]
        first = frames.offsets[int(self.row_W[i])].as_py()
        return memoryview(frames.values[first + frame].as_buffer()).cast("B")

    def fbank(self, i: int) -> memoryview:
        """The stored fbank of the i-th clip."""
        return memoryview(self.fbanks[self.table_W[i]][int(self.row_W[i])].as_buffer()).cast("B")


class WindowReader:
    """Reads the clips of some consecutive steps and yields them step by step, decoded.

    One row group is read once per window; only the frames that are asked for are decoded.
    """

    def __init__(self, index: RowIndex, seed: int) -> None:
        self.index, self.seed = index, seed

    def read(self, positions_SVb: NDArray[np.int64], views: Views, epoch: int) -> Iterator[Batch]:
        """Yields one batch a step: key u64 [n], label i64 [n], position i64 [n],
        fbank f16 [n, T, M], frames u8 [n, views * F, H, W, 3]; n = lanes * b, lane after lane."""
        positions = positions_SVb.reshape(len(positions_SVb), -1)
        wanted, inverse = np.unique(positions, return_inverse=True)
        encoded = _Encoded(self.index, wanted)
        for step, places in enumerate(inverse.reshape(positions.shape)):
            yield self._decode(positions[step], places, encoded, views, epoch)

    def _decode(
        self,
        positions: NDArray[np.int64],
        places: NDArray[np.int64],
        encoded: _Encoded,
        views: Views,
        epoch: int,
    ) -> Batch:
        index, spec = self.index, self.index.spec
        keys = index.keys_N[positions]
        chosen = choose_frames(keys, spec.n_frames, views, self.seed, epoch)
        jpegs = [
            encoded.jpeg(i, frame)
            for i, which in zip(places, chosen.tolist(), strict=True)
            for frame in which
        ]
        frames = decode_jpegs(jpegs)
        return {
            "position": positions,
            "key": keys,
            "label": index.labels_N[positions],
            "fbank": np.stack([fbank_array(encoded.fbank(i), spec) for i in places]),
            "frames": frames.reshape(len(positions), -1, *frames.shape[1:]),
        }
