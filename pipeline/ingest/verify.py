"""verify: does a store hold what it says? Every shard is opened, a sample is decoded again.

Reads the store and the source clips; knows nothing of Ray. Invariant: without `repair` nothing is
changed; with it, the bad rows that were seen are forgotten and no others, so that the next ingest
makes their features anew. What became of a source is no reason to forget good features: they may be
all that is left of it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from av.video.reformatter import VideoReformatter

from pipeline.config import LEASE_STALE_S, FeatureSpec, IngestConfig
from pipeline.decode.frames import frames_in_order, pixel_aspect, to_square
from pipeline.decode.payload import decode_jpegs, fbank_array
from pipeline.decode.timeline import read_timeline
from pipeline.errors import DamagedShard
from pipeline.reasons import Reason, Rejected
from pipeline.side_by_side import side_by_side
from pipeline.source.fetch import Fetched, fetch_all
from pipeline.source.tar_parts import part_of
from pipeline.storage import is_storage_failure
from pipeline.store.shards import AT_ONCE, by_shard, read_rows, spec_hash_of
from pipeline.store.store import FeatureStore, Snapshot

# Mean absolute difference of two 8-bit pictures: JPEG at quality 95 and another scaler make 1-4,
# the neighbouring frame of a moving scene more.
_MOST_DIFFERENCE = 8.0
STORE, SOURCE = "store", "source"
"""Where a problem was found: in what is stored, which can be made anew, or in the source alone."""


class _Checked(NamedTuple):
    """What is wrong with a clip."""

    of_row: list[str]
    of_source: str = ""
    n_compared: int = 0
    """Frames compared with the source."""


def verify(uri: str, sample: int, seed: int = 0, repair: bool = False) -> dict[str, Any]:
    """Check all shards, and `sample` clips in depth.

    Returns: {"clips", "shards", "sampled", "compared" (frames against their source),
        "problems": [{"clip_id", "shard", "problem", "found_in": STORE or SOURCE}],
        "repaired" (clips forgotten under the spec in force: of problems in the store), "version"}.
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
    for clip, path in _with_sources(_states(snapshot, good.take(drawn)["clip_id"])):
        checked = _check_clip(snapshot, clip, path)
        problems += [_problem(clip, told) for told in checked.of_row]
        if checked.of_source:
            problems.append(_problem(clip, checked.of_source, SOURCE))
        n_compared += checked.n_compared
    report: dict[str, Any] = {
        "clips": len(live),
        "shards": len(pc.unique(live["shard"])),
        "sampled": len(drawn),
        "compared": n_compared,
        "problems": problems,
        "repaired": 0,
        "version": snapshot.version,
    }
    bad |= {problem["clip_id"] for problem in problems if problem["found_in"] == STORE}
    if repair and bad:
        is_bad = pc.is_in(live["clip_id"], value_set=pa.array(sorted(bad), pa.string()))
        report |= _forget(store, snapshot.spec_hash, live.filter(is_bad))
    return report


def _problem(clip: dict[str, Any], told: str, found_in: str = STORE) -> dict[str, str]:
    return {
        "clip_id": clip["clip_id"],
        "shard": clip["shard"],
        "problem": told,
        "found_in": found_in,
    }


def _check_shards(snapshot: Snapshot, live: pa.Table) -> Iterator[dict[str, str]]:
    """Every row the clips table points at is there, is of that clip and of the spec in force."""
    keys = snapshot.states(["clip_id", "row_key"])
    position = pc.index_in(live["clip_id"], value_set=keys["clip_id"].combine_chunks())
    live = live.append_column("row_key", keys["row_key"].take(position))

    def opened(of_shard: tuple[str, pa.Table]) -> pa.Table | DamagedShard:
        try:
            return read_rows(snapshot.uri, of_shard[0], None, ["clip_id", "row_key"])
        except DamagedShard as error:
            return error

    tables = side_by_side(opened, by_shard(live), AT_ONCE)
    for (_, rows), table in zip(by_shard(live), tables, strict=True):
        mine = rows.to_pylist()
        if isinstance(table, DamagedShard):
            yield from (_problem(clip, str(table)) for clip in mine)
            continue
        stored, spec_hash = table.to_pylist(), spec_hash_of(table)
        if spec_hash != snapshot.spec_hash:
            problem = f"features of spec {spec_hash} in place of {snapshot.spec_hash}"
            yield from (_problem(clip, problem) for clip in mine)
            continue
        for clip in mine:
            row = stored[clip["row"]] if clip["row"] < len(stored) else {}
            if (row.get("clip_id"), row.get("row_key")) != (clip["clip_id"], clip["row_key"]):
                found = row.get("clip_id", "the end of the file")
                yield _problem(clip, f"row {clip['row']} should be of this clip and is {found}")


def _states(snapshot: Snapshot, clip_ids: pa.ChunkedArray) -> list[dict[str, Any]]:
    """The rows of the clips table of some clips, in their order."""
    states = snapshot.clips
    position = pc.index_in(clip_ids, value_set=states["clip_id"].combine_chunks())
    rows: list[dict[str, Any]] = states.take(position.combine_chunks()).to_pylist()
    return rows


def _with_sources(states: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each clip, and where its source lies for now; None if the bytes that its features were made
    from are not to be had. Clips of a tar part come together: it is a stream, read from its start.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for state in states:
        groups.setdefault(part_of(state["uri"]) or state["clip_id"], []).append(state)
    for group in groups.values():
        left = {state["clip_id"]: (state, state["fp"]) for state in group}
        try:
            for fetched in fetch_all(group, IngestConfig()):
                try:
                    state, planned = left[fetched.clip["clip_id"]]
                    is_other = fetched.rejected or _is_replaced(fetched) or state["fp"] != planned
                    del left[state["clip_id"]]
                    yield state, None if is_other else fetched.path
                finally:
                    fetched.release()
        except Exception as error:
            # A part that is gone, a folder that is not mounted.
            if not is_storage_failure(error):
                raise
        yield from ((state, None) for state, _ in left.values())


def _check_clip(snapshot: Snapshot, clip: dict[str, Any], source: str | None) -> _Checked:
    """One clip's payload, by itself and beside the source (a local path), if there is one."""
    spec = snapshot.spec
    columns = ["frames", "frame_ts_ms", "fbank", "fbank_frames"]
    try:
        table = read_rows(snapshot.uri, clip["shard"], np.array([clip["row"]]), columns)
        row = table.to_pylist()[0]
        images_NHW3 = decode_jpegs(row["frames"])
        fbank_TM = fbank_array(row["fbank"], spec)
    except (DamagedShard, ValueError) as error:
        return _Checked([f"cannot be read: {error}"])
    problems = []
    expected = (spec.n_frames, spec.frame_size, spec.frame_size, 3)
    if images_NHW3.shape != expected:
        problems.append(f"frames are {images_NHW3.shape}, expected {expected}")
    if not np.isfinite(fbank_TM).all() or fbank_TM[row["fbank_frames"] :].any():
        problems.append("the fbank is not finite, or not zero after its valid rows")
    if row["frame_ts_ms"] != sorted(row["frame_ts_ms"]):
        problems.append(f"frame times do not rise: {row['frame_ts_ms']}")
    if problems or source is None:
        return _Checked(problems)
    try:
        shown = _decode_all(source, clip, spec)
    except Exception as error:
        # A folder that is not mounted any more: also where the decoder says so.
        if is_storage_failure(error):
            return _Checked([])
        if not isinstance(error, (Rejected, av.FFmpegError)):
            raise
        return _Checked([], f"the source does not decode any more ({error}); its features stay")
    return _compare(shown, images_NHW3, row["frame_ts_ms"])


def _compare(
    source: list[tuple[float, np.ndarray]], images_NHW3: np.ndarray, times_ms: list[int]
) -> _Checked:
    """Stored frames against FFmpeg's sequential decode, one frame to either side allowed."""
    source_ms = np.array([time_ms for time_ms, _ in source])
    problems = []
    for image, time_ms in zip(images_NHW3, times_ms, strict=True):
        at = int(np.abs(source_ms - time_ms).argmin())
        near = [square for _, square in source[max(0, at - 1) : at + 2]]
        difference = min(float(np.abs(image.astype(int) - square).mean()) for square in near)
        if difference > _MOST_DIFFERENCE:
            problems.append(f"the frame stored for {time_ms} ms is {difference:.0f} levels off")
    return _Checked(problems, n_compared=len(times_ms))


def _is_replaced(fetched: Fetched) -> bool:
    """Whether a clip's file is another one now, or none."""
    try:
        return fetched.changed()
    except Rejected:
        return True


def _decode_all(
    path: str, state: dict[str, Any], spec: FeatureSpec
) -> list[tuple[float, np.ndarray]]:
    """All frames of the window as stored squares, with their times in ms."""
    reformatter = VideoReformatter()
    with av.open(path, metadata_errors="replace") as container:
        timeline = read_timeline(container, state["start_s"] or 0.0, spec.duration_s)
        aspect = pixel_aspect(timeline.video.stream)
        frames = [
            (1000 * time_s, to_square(frame, reformatter, aspect, spec))
            for time_s, frame in frames_in_order(timeline)
        ]
    if not frames:
        raise Rejected(Reason.VIDEO_DECODE, "no frame in the window")
    return frames


def _forget(store: FeatureStore, spec_hash: str, bad: pa.Table) -> dict[str, int]:
    """Take rows out of the log: to the next ingest these clips have no features of the spec.

    By a log without them, as a row that says a clip is removed speaks for all specs. The lease was
    not held while the store was looked at: what was decoded since lies in another shard, and stays.

    Args: bad: clip_id, shard and row of what was found bad, of that spec.
    """
    with store.lease(LEASE_STALE_S, "store verify --repair") as lease:
        snapshot = store.snapshot()
        rows, version = snapshot.kept_rows(), snapshot.version
        at = pc.index_in(rows["clip_id"], value_set=bad["clip_id"].combine_chunks())
        seen = bad.take(at.combine_chunks())
        is_bad = pc.equal(rows["spec_hash"], spec_hash)
        for name in ("shard", "row"):
            is_bad = pc.and_(is_bad, pc.equal(rows[name], seen[name]))
        is_bad = is_bad.fill_null(False)
        n_bad = pc.sum(is_bad).as_py() or 0
        if n_bad:
            left = rows.filter(pc.invert(is_bad))
            version = store.rewrite_log(left, version, lease.check, by="verify --repair")
    return {"repaired": n_bad, "version": version}
