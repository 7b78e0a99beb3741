"""read_window: a window of clips to decoded batches, one a step.

The edge of the store's shards: knows nothing of Ray, of orders or of augmentation. Invariant: a
batch is a function of its window alone, so any process may read it, and read it again.

Shapes: n clips of a step (lane after lane), v views, F frames of a view, S steps of a window, W
distinct clips of a window, L labels of a clip, T fbank frames, M mel bins.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clustering.kmeans.hashing import GOLDEN, hash64
from pipeline.decode.payload import decode_jpegs, fbank_array
from pipeline.side_by_side import side_by_side
from pipeline.store.cached import ShardCache
from pipeline.store.shards import AT_ONCE, read_rows
from training.data.frames import frames_at
from training.data.order import EpochReads, FrameDraw, Window, WindowPlan


class Batch(NamedTuple):
    """The clips of one step that a worker reads, decoded."""

    position: NDArray[np.int64]
    """[n], in the `RowIndex`."""
    key: NDArray[np.uint64]
    """[n]."""
    labels: NDArray[np.int32]
    """[n, L] as in the `RowIndex`: -1 where there is no label, or no further one."""
    fbank: NDArray[np.float16]
    """[n, T, M], as stored."""
    frames: NDArray[np.uint8]
    """[n, v * F, H, W, 3]."""


class Reader(Protocol):
    """Where a trainer gets its batches."""

    def stream(self, epochs: Iterable[EpochReads]) -> Iterator[Batch]:
        """The steps of these epochs, one after the other."""
        ...

    def sweep(self, frames: FrameDraw) -> Iterator[Batch]:
        """Every clip of this worker's share once, without randomness."""
        ...


class LocalReader:
    """Decodes in this process; for tests, small sets and machines without Ray."""

    def __init__(self, windows: WindowPlan, cache: ShardCache | None = None) -> None:
        self.windows, self.cache = windows, cache

    def stream(self, epochs: Iterable[EpochReads]) -> Iterator[Batch]:
        """See `Reader`."""
        for reads in epochs:
            for window in self.windows.windows(reads):
                yield from read_window(window, self.cache)

    def sweep(self, frames: FrameDraw) -> Iterator[Batch]:
        """See `Reader`."""
        for window in self.windows.sweep(frames):
            yield from read_window(window, self.cache)


def choose_frames(
    keys_n: NDArray[np.uint64],
    n_stored: int,
    frames: FrameDraw,
    seed: int,
    epoch: int,
    visits_n: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Stored frames to decode, [n, v * F]: one from each of F equal segments of the clip.

    Args: visits_n: how often the epoch took the clip before; each time other frames are drawn.
    """
    v, F = frames.n_views, frames.frames_per_clip
    places = np.full((len(keys_n), v, F), 0.5)
    if frames.random:
        places = _uniform(keys_n, seed, epoch, visits_n, v * F).reshape(places.shape)
    return frames_at(n_stored, places).reshape(len(keys_n), -1)


def _uniform(
    keys_n: NDArray[np.uint64], seed: int, epoch: int, visits_n: NDArray[np.int64], k: int
) -> NDArray[np.float64]:
    """k numbers in [0, 1) per clip, from its key, seed, epoch and visit alone: [n, k].

    Visit by visit the next k outputs of a splitmix64 generator, whose finaliser `hash64` is.
    """
    start = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    which_nk = visits_n.astype(np.uint64)[:, None] * np.uint64(k) + np.arange(k, dtype=np.uint64)
    draws_nk = hash64((keys_n ^ start)[:, None] + which_nk * GOLDEN)
    # The upper 53 bits: what a float64 holds exactly.
    return (draws_nk >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _Encoded:
    """Encoded features of a window's clips, left in Arrow memory until one is wanted."""

    def __init__(self, window: Window, cache: ShardCache | None) -> None:
        self.frames: list[pa.ListArray] = []
        self.fbanks: list[pa.BinaryArray] = []
        self.shard_W = window.shard_W
        self.row_W = np.empty(len(window.row_W), np.int64)
        of_shard = [np.flatnonzero(window.shard_W == n) for n in range(len(window.shards))]

        def read(number: int) -> pa.Table:
            # Other windows will come back to this shard.
            return read_rows(
                window.store_uri,
                window.shards[number],
                window.row_W[of_shard[number]],
                ["frames", "fbank"],
                keeps_footer=True,
                cache=cache,
            ).combine_chunks()

        tables = side_by_side(read, range(len(of_shard)), AT_ONCE)
        for here, table in zip(of_shard, tables, strict=True):
            self.frames.append(table["frames"].chunk(0))
            self.fbanks.append(table["fbank"].chunk(0))
            self.row_W[here] = np.arange(len(here))

    def jpeg(self, i: int, frame: int) -> memoryview:
        """One encoded frame of the i-th clip."""
        frames = self.frames[self.shard_W[i]]
        first = frames.offsets[int(self.row_W[i])].as_py()
        return memoryview(frames.values[first + frame].as_buffer()).cast("B")

    def fbank(self, i: int) -> memoryview:
        """The stored fbank of the i-th clip."""
        return memoryview(self.fbanks[self.shard_W[i]][int(self.row_W[i])].as_buffer()).cast("B")


def read_window(window: Window, cache: ShardCache | None = None) -> Iterator[Batch]:
    """The steps of a window, decoded.

    A row group is read once; of the frames, only those asked for are decoded.
    Args: cache: where this node keeps row groups of a store in a bucket; no bit depends on it.
    """
    encoded = _Encoded(window, cache)
    for places_n, visits_n in zip(window.places_Sn, window.visits_Sn, strict=True):
        keys_n = window.key_W[places_n]
        chosen = choose_frames(
            keys_n, window.spec.n_frames, window.frames, window.seed, window.epoch, visits_n
        )
        jpegs = [
            encoded.jpeg(i, frame)
            for i, which in zip(places_n, chosen.tolist(), strict=True)
            for frame in which
        ]
        frames = decode_jpegs(jpegs)
        yield Batch(
            position=window.position_W[places_n],
            key=keys_n,
            labels=window.labels_WL[places_n],
            fbank=np.stack([fbank_array(encoded.fbank(i), window.spec) for i in places_n]),
            frames=frames.reshape(len(places_n), -1, *frames.shape[1:]),
        )
