"""FeatureStats: mean and standard deviation of the features of a split, kept in the store.

Streams through the shards; knows nothing of training. Invariant: statistics are of exactly the
rows, features and spec they name; of other rows they are never used.

`stats/<split>-<digest of the rows>.json`. Sums are float64, put together exactly (math.fsum), so
that neither the order of the shards nor the number of processes changes the result.

Shapes: T fbank rows, M mels, H x W pixels.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import FeatureSpec
from pipeline.cores import usable_cores
from pipeline.decode.payload import decode_jpegs, fbank_array
from pipeline.quality.run import Progress, refuse_no_clips
from pipeline.side_by_side import side_by_side
from pipeline.store.shards import by_shard, with_features
from pipeline.store.store import FeatureStore, Snapshot


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of the live clips of one split."""

    split: str
    version: int
    """Version of the clips table they were first made from."""
    spec_hash: str
    rows_digest: str
    """Which clips of which content: equal for equal features."""
    clips: int
    fbank_mean: float
    """Over every value of every stored fbank, the zeros after the sound included: that is what
    training normalises (and how CAV-MAE's -5.081 and 4.4849 were made)."""
    fbank_std: float
    pixel_mean: tuple[float, float, float] | None = None
    """Red, green and blue, in [0, 1], over every stored frame; None: not computed."""
    pixel_std: tuple[float, float, float] | None = None


class _Sums(NamedTuple):
    """Number, sum and sum of squares of fbank values [1] and of pixels [3]."""

    n_values: int
    fbank: tuple[float, float]
    n_pixels: int
    pixels: tuple[float, ...]


def stored_stats(store: FeatureStore, snapshot: Snapshot, split: str) -> FeatureStats | None:
    """Statistics in the store that are of exactly this split's rows; None if there are none."""
    try:
        stored = json.loads(store.location.read_bytes(_name(split, _rows_digest(snapshot, split))))
    except FileNotFoundError:
        return None
    for name in ("pixel_mean", "pixel_std"):
        stored[name] = stored[name] and tuple(stored[name])
    return FeatureStats(**stored)


def compute_stats(
    store: FeatureStore,
    snapshot: Snapshot,
    split: str,
    *,
    with_pixels: bool = True,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> FeatureStats:
    """Statistics of a split, from the store if they are there, else made and kept.

    Args: with_pixels: the frames too, which are decoded for it (20 times the work).
    Raises: StoreError if the split has no clips.
    """
    known = stored_stats(store, snapshot, split)
    if known is not None and (known.pixel_mean is not None or not with_pixels):
        return known
    rows = snapshot.rows(split)
    refuse_no_clips(snapshot, snapshot.rows(None), split)
    sums = list(_summed(snapshot, rows, with_pixels, on_progress))
    stats = _put_together(sums, snapshot, split, n_clips=len(rows))
    content = json.dumps(asdict(stats), indent=1).encode()
    store.location.write_bytes(_name(split, stats.rows_digest), content)
    return stats


def _put_together(
    sums: list[_Sums], snapshot: Snapshot, split: str, *, n_clips: int
) -> FeatureStats:
    fbank_mean, fbank_std = _moments(sum(s.n_values for s in sums), [s.fbank for s in sums])
    colours = []
    if any(s.n_pixels for s in sums):
        n_pixels = sum(s.n_pixels for s in sums)
        of_colour = [[(s.pixels[c], s.pixels[3 + c]) for s in sums] for c in range(3)]
        colours = [_moments(n_pixels, pairs) for pairs in of_colour]
    return FeatureStats(
        split=split,
        version=snapshot.version,
        spec_hash=snapshot.spec_hash,
        rows_digest=_rows_digest(snapshot, split),
        clips=n_clips,
        fbank_mean=fbank_mean,
        fbank_std=fbank_std,
        pixel_mean=(colours[0][0], colours[1][0], colours[2][0]) if colours else None,
        pixel_std=(colours[0][1], colours[1][1], colours[2][1]) if colours else None,
    )


def _name(split: str, rows_digest: str) -> str:
    # A split may be called anything; a file name may not.
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in split)
    return f"stats/{safe}-{rows_digest}.json"


def _rows_digest(snapshot: Snapshot, split: str) -> str:
    """Equal for equal features of a split, whatever its labels and wherever they lie."""
    states = snapshot.states(["clip_id", "row_key", "split", "status", "spec_hash"])
    mine = pc.and_(
        pc.and_(pc.equal(states["status"], "ok"), pc.equal(states["split"], split)),
        pc.equal(states["spec_hash"], snapshot.spec_hash),
    )
    keys = sorted(states.filter(mine)["row_key"].to_pylist())
    return hashlib.sha256("\0".join([split, *keys]).encode()).hexdigest()[:16]


def _summed(
    snapshot: Snapshot,
    rows: pa.Table,
    with_pixels: bool,
    on_progress: Callable[[Progress], None],
) -> Iterator[_Sums]:
    """Sums of each row group, a shard to a thread: JPEGs and numpy leave the lock alone."""
    began, n_done = time.monotonic(), 0
    columns = ["fbank", *(["frames"] if with_pixels else [])]
    spec = snapshot.spec  # Read once, before the threads.

    def work(of_shard: tuple[str, pa.Table]) -> list[tuple[int, _Sums]]:
        tables = with_features(snapshot.uri, of_shard[1], columns)
        return [(len(table), _sums_of(table.to_pylist(), spec)) for _, table in tables]

    for of_shard in side_by_side(work, by_shard(rows), usable_cores()):
        for n_clips, sums in of_shard:
            n_done += n_clips
            rate = n_done / max(time.monotonic() - began, 1e-3)
            on_progress(Progress(len(rows), n_done, rate, (len(rows) - n_done) / rate))
            yield sums


def _sums_of(rows: list[dict[str, Any]], spec: FeatureSpec) -> _Sums:
    fbanks, pixels, n_pixels = [], np.zeros(6), 0
    for row in rows:
        # float16 in float64: the sum of an fbank is exact, that of squares to the last bit or so.
        fbank_TM = fbank_array(row["fbank"], spec).astype(np.float64)
        fbanks.append((float(fbank_TM.sum()), float(np.square(fbank_TM).sum())))
        if "frames" in row:
            levels_P3 = decode_jpegs(row["frames"]).reshape(-1, 3)
            # Sums of 8-bit levels are whole numbers: exact.
            counts_3L = [np.bincount(levels_P3[:, c], minlength=256) for c in range(3)]
            levels_L = np.arange(256, dtype=np.float64)
            pixels[:3] += [counts @ levels_L for counts in counts_3L]
            pixels[3:] += [counts @ levels_L**2 for counts in counts_3L]
            n_pixels += len(levels_P3)
    scaled = tuple(pixels / np.array([255.0] * 3 + [255.0**2] * 3))
    n_values = len(rows) * spec.fbank_frames * spec.n_mels
    sums, squares = zip(*fbanks, strict=True)
    return _Sums(n_values, (math.fsum(sums), math.fsum(squares)), n_pixels, scaled)


def _moments(n: int, sums: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean and standard deviation of n values from sums and sums of squares of parts."""
    mean = math.fsum(first for first, _ in sums) / n
    variance = math.fsum(second for _, second in sums) / n - mean**2
    return mean, math.sqrt(max(variance, 0.0))
