"""verify: does a store hold what it says? Every shard is opened, a sample is decoded again.

Reads the store and the source clips; knows nothing of Ray. Invariant: without `repair` nothing is
changed; with it, the clips of bad rows are forgotten, so that the next ingest makes them anew.
"""

from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from av.video.reformatter import VideoReformatter

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.decode.frames import frames_in_order, pixel_aspect, to_square
from pipeline.decode.payload import decode_jpegs, fbank_array
from pipeline.decode.timeline import read_timeline
from pipeline.errors import DamagedShard
from pipeline.reasons import Rejected
from pipeline.source.fetch import fetch_all
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.shards import read_rows, shard_spec_hash
from pipeline.store.store import FeatureStore, Snapshot

_LEASE_STALE_S = 60.0
# Mean absolute difference of two 8-bit pictures: JPEG at quality 95 and another scaler make 1-4,
# the neighbouring frame of a moving scene more.
_MOST_DIFFERENCE = 8.0


def verify(uri: str, sample: int = 32, seed: int = 0, repair: bool = False) -> dict[str, Any]:
    """Check all shards, and `sample` clips in depth.

    Returns: {"clips", "shards", "sampled", "compared" (frames against their source),
        "problems": [{"clip_id", "shard", "problem"}], "repaired", "version"}.
    Raises: StoreError if there is no store, or the storage refuses to give a shard, which says
        nothing of its clips: nothing is forgotten then; StoreLocked with `repair` if it is being
        written.
    """
    store = FeatureStore.open(uri)
    snapshot = store.snapshot()
    live = snapshot.rows(None)
    problems = list(_check_shards(snapshot, live))
    bad = {problem["clip_id"] for problem in problems}
    good = live.filter(pc.invert(pc.is_in(live["clip_id"], value_set=pa.array(bad, pa.string()))))
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.permutation(len(good))[:sample])
    n_compared = 0
    for clip in good.take(drawn).to_pylist():
        found, n_frames = _check_clip(snapshot, clip)
        problems += [{**_where(clip), "problem": problem} for problem in found]
        n_compared += n_frames
    report: dict[str, Any] = {
        "clips": len(live),
        "shards": len(pc.unique(live["shard"])),
        "sampled": len(drawn),
        "compared": n_compared,
        "problems": problems,
        "repaired": 0,
        "version": snapshot.version,
    }
    if repair and problems:
        report |= _forget(store, {problem["clip_id"] for problem in problems})
    return report


def _where(clip: dict[str, Any]) -> dict[str, str]:
    return {"clip_id": clip["clip_id"], "shard": clip["shard"]}


def _check_shards(snapshot: Snapshot, live: pa.Table) -> Iterator[dict[str, str]]:
    """Every row the clips table points at is there, is of that clip and of the spec in force."""
    keys = snapshot.states(["clip_id", "row_key"])
    position = pc.index_in(live["clip_id"], value_set=keys["clip_id"].combine_chunks())
    live = live.append_column("row_key", keys["row_key"].take(position))
    for shard in pc.unique(live["shard"]).to_pylist():
        mine = live.filter(pc.equal(live["shard"], shard)).to_pylist()
        try:
            stored = read_rows(snapshot.uri, shard, None, ["clip_id", "row_key"]).to_pylist()
            spec_hash = shard_spec_hash(snapshot.uri, shard)
        except DamagedShard as error:
            yield from ({**_where(clip), "problem": str(error)} for clip in mine)
            continue
        if spec_hash != snapshot.spec_hash:
            problem = f"features of spec {spec_hash} in place of {snapshot.spec_hash}"
            yield from ({**_where(clip), "problem": problem} for clip in mine)
            continue
        for clip in mine:
            row = stored[clip["row"]] if clip["row"] < len(stored) else {}
            if (row.get("clip_id"), row.get("row_key")) != (clip["clip_id"], clip["row_key"]):
                found = row.get("clip_id", "the end of the file")
                problem = f"row {clip['row']} should be of this clip and is {found}"
                yield {**_where(clip), "problem": problem}


def _check_clip(snapshot: Snapshot, clip: dict[str, Any]) -> tuple[list[str], int]:
    """Problems of one clip's payload, and how many frames were compared with the source."""
    spec = snapshot.spec
    columns = ["frames", "frame_ts_ms", "fbank", "fbank_frames"]
    try:
        table = read_rows(snapshot.uri, clip["shard"], np.array([clip["row"]]), columns)
        row = table.to_pylist()[0]
        images_NHW3 = decode_jpegs(row["frames"])
        fbank_TM = fbank_array(row["fbank"], spec)
    except (DamagedShard, ValueError) as error:
        return [f"cannot be read: {error}"], 0
    problems = []
    expected = (spec.n_frames, spec.frame_size, spec.frame_size, 3)
    if images_NHW3.shape != expected:
        problems.append(f"frames are {images_NHW3.shape}, expected {expected}")
    if not np.isfinite(fbank_TM).all() or fbank_TM[row["fbank_frames"] :].any():
        problems.append("the fbank is not finite, or not zero after its valid rows")
    if row["frame_ts_ms"] != sorted(row["frame_ts_ms"]):
        problems.append(f"frame times do not rise: {row['frame_ts_ms']}")
    if problems:
        return problems, 0
    wrong, n_compared = _compare_with_source(snapshot, clip, images_NHW3, row["frame_ts_ms"])
    return wrong, n_compared


def _compare_with_source(
    snapshot: Snapshot, clip: dict[str, Any], images_NHW3: np.ndarray, times_ms: list[int]
) -> tuple[list[str], int]:
    """Stored frames against FFmpeg's sequential decode, one frame to either side allowed."""
    states = snapshot.clips
    state = states.filter(pc.equal(states["clip_id"], clip["clip_id"])).to_pylist()[0]
    planned = state["fp"]
    fetched = next(fetch_all([state], IngestConfig()))
    try:
        if fetched.rejected or fetched.changed() or state["fp"] != planned:
            return [], 0  # Not the bytes the features were made from: nothing to compare with.
        source = _decode_all(fetched.path, state, snapshot.spec)
    except Rejected as rejected:
        return [f"the source does not decode any more: {rejected}"], 0
    finally:
        fetched.release()
    source_ms = np.array([time_ms for time_ms, _ in source])
    problems = []
    for image, time_ms in zip(images_NHW3, times_ms, strict=True):
        at = int(np.abs(source_ms - time_ms).argmin())
        near = [square for _, square in source[max(0, at - 1) : at + 2]]
        difference = min(float(np.abs(image.astype(int) - square).mean()) for square in near)
        if difference > _MOST_DIFFERENCE:
            problems.append(f"the frame stored for {time_ms} ms is {difference:.0f} levels off")
    return problems, len(times_ms)


def _decode_all(
    path: str, state: dict[str, Any], spec: FeatureSpec
) -> list[tuple[float, np.ndarray]]:
    """All frames of the window as stored squares, with their times in ms."""
    reformatter = VideoReformatter()
    with av.open(path, metadata_errors="replace") as container:
        timeline = read_timeline(container, state["start_s"] or 0.0, spec.duration_s)
        aspect = pixel_aspect(timeline.video.stream)
        return [
            (1000 * time_s, to_square(frame, reformatter, aspect, spec))
            for time_s, frame in frames_in_order(timeline)
        ]


def _forget(store: FeatureStore, clip_ids: set[str]) -> dict[str, int]:
    """Tombstones for clips: the next ingest sees them as new."""
    with store.lease(_LEASE_STALE_S, "store verify --repair") as lease:
        states = store.snapshot().clips
        wanted = pa.array(sorted(clip_ids), pa.string())
        rows = states.filter(pc.is_in(states["clip_id"], value_set=wanted))
        index = CLIPS_SCHEMA.get_field_index("status")
        removed = pa.array(["removed"] * len(rows), pa.string())
        version = store.append(
            rows.set_column(index, CLIPS_SCHEMA.field(index), removed),
            {"by": "verify --repair"},
            lease.check,
        )
    return {"repaired": len(rows), "version": version}
