"""scan: the signals of many clips, by local processes that stream through shards and sources.

Knows nothing of rules, duplicates or of where the result is kept. Invariant: every clip comes back
once, whatever its file or shard does; a source that cannot be read costs the signals that need it
and nothing else.
"""

import multiprocessing
import queue
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.cores import usable_cores
from pipeline.decode.payload import fbank_array
from pipeline.decode.sandbox import Sandbox
from pipeline.errors import PipelineError
from pipeline.quality.container import SourceSignals
from pipeline.quality.features import measure_features
from pipeline.quality.table import MEASURED_SCHEMA
from pipeline.reasons import Reason, Rejected
from pipeline.source.fetch import Fetched, fetch_all
from pipeline.source.tar_parts import part_of
from pipeline.storage import is_storage_failure
from pipeline.store.shards import by_row_group, read_pieces

MEASURED_BY = 2
"""Version of the measurement: raised when a signal or a print becomes another number."""
_CHUNK = 256
_FEWEST_FOR_PROCESSES = 512
"""A process takes a second to start, and measures that many clips in two."""
_MOST_FAILURES = 3
_FEATURE_COLUMNS = ["frames", "frame_ts_ms", "fbank", "fbank_frames"]


@dataclass(frozen=True)
class ScanSettings:
    """What all clips of a scan share."""

    store_uri: str
    spec: FeatureSpec
    reads_sources: bool


class _Looked(NamedTuple):
    """A clip and what its source said."""

    clip: dict[str, Any]
    source: str
    signals: SourceSignals


def scan(clips: pa.Table, settings: ScanSettings, workers: int | None = None) -> Iterator[pa.Table]:
    """Measure clips (columns of the clips table). Yields MEASURED_SCHEMA, at most 256 rows a time.

    Args: workers: processes; None: one per core.
    Raises: PipelineError if a process dies; StoreError if a shard cannot be read.
    """
    groups = _groups(clips)
    n_workers = min(workers or usable_cores(), len(groups))
    if n_workers <= 1 or len(clips) < _FEWEST_FOR_PROCESSES:
        looker = _Looker(settings)
        try:
            for group in groups:
                yield from looker.measure(group)
        finally:
            looker.close()
    else:
        yield from _by_processes(groups, settings, n_workers)


def _groups(clips: pa.Table) -> list[list[dict[str, Any]]]:
    """Clips of one tar part, which is read once from end to end, or of one shard."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for clip in clips.to_pylist():
        part = part_of(clip["uri"])
        groups.setdefault((part or "", "" if part else clip["shard"] or ""), []).append(clip)
    return sorted(groups.values(), key=len, reverse=True)


class _Looker:
    """Measures one group after the other, with a child process for containers."""

    def __init__(self, settings: ScanSettings) -> None:
        self.settings = settings
        ingest = IngestConfig()
        # No config of an ingest is at hand: sources are read as one does by default.
        self._sandbox = Sandbox(
            "pipeline.quality.container:probe_source",
            timeout_s=ingest.timeout_s,
            max_calls=ingest.child_clips,
            max_memory_mb=ingest.child_memory_mb,
        )

    def close(self) -> None:
        """End the child."""
        self._sandbox.close()

    def measure(self, group: list[dict[str, Any]]) -> Iterator[pa.Table]:
        """Yields MEASURED_SCHEMA, a chunk at a time."""
        chunk: list[_Looked] = []
        for looked in self._look(group):
            chunk.append(looked)
            if len(chunk) == _CHUNK:
                yield self._measured(chunk)
                chunk = []
        if chunk:
            yield self._measured(chunk)

    def _look(self, group: list[dict[str, Any]]) -> Iterator[_Looked]:
        if not self.settings.reads_sources:
            yield from (_Looked(clip, "not asked", SourceSignals()) for clip in group)
            return
        left = [clip for clip in group if clip["reason"] != Reason.MISSING]
        yield from (
            _Looked(clip, "gone", SourceSignals())
            for clip in group
            if clip["reason"] == Reason.MISSING
        )
        n_failures = 0
        while left:
            returned = set[str]()
            by_id = {clip["clip_id"]: clip for clip in left}
            why = "gone"
            try:
                for fetched in fetch_all([dict(clip) for clip in left], IngestConfig()):
                    n_failures = 0
                    looked = self._probe(fetched, by_id[fetched.clip["clip_id"]])
                    # Not before it has a row: a clip that failed meanwhile would have none.
                    returned.add(looked.clip["clip_id"])
                    yield looked
            except Exception as error:
                if not is_storage_failure(error):
                    raise
                n_failures += 1
                why = "gone" if isinstance(error, FileNotFoundError) else "unreachable"
            left = [clip for clip in left if clip["clip_id"] not in returned]
            if not left:
                return
            # Storage failed at the first of those left; a part, or a bucket that is away, at all.
            n_lost = 1
            if part_of(left[0]["uri"]) or n_failures >= _MOST_FAILURES:
                n_lost = len(left)
            yield from (_Looked(clip, why, SourceSignals()) for clip in left[:n_lost])
            left = left[n_lost:]

    def _probe(self, fetched: Fetched, clip: dict[str, Any]) -> _Looked:
        """Args: clip: as the store has it; that of `fetched` follows the file."""
        nothing = SourceSignals()
        try:
            if fetched.rejected:
                raise fetched.rejected
            if fetched.changed() or fetched.clip["fp"] != clip["fp"]:
                return _Looked(clip, "changed", nothing)
            window_s = self.settings.spec.duration_s
            if clip["end_s"] is not None:
                window_s = min(window_s, clip["end_s"] - (clip["start_s"] or 0.0))
            self._sandbox.submit(fetched.path, clip["start_s"], window_s)
            signals: SourceSignals = self._sandbox.result()
            return _Looked(clip, "unreadable" if signals.problem else "read", signals)
        except Rejected as rejected:
            gone = rejected.reason == Reason.MISSING
            return _Looked(clip, "gone" if gone else "unreadable", nothing)
        except OSError:
            # A folder that may not be entered, or whose disk is away: of this clip alone.
            return _Looked(clip, "unreachable", nothing)
        finally:
            fetched.release()

    def _measured(self, chunk: list[_Looked]) -> pa.Table:
        from_features = self._features([looked.clip for looked in chunk])
        rows = []
        for clip, source, signals in chunk:
            row = {name: clip[name] for name in MEASURED_SCHEMA.names if name in clip}
            row |= {"measured_by": MEASURED_BY, "source": source}
            row |= {k: v for k, v in signals._asdict().items() if k != "problem"}
            row |= from_features.get(clip["clip_id"], {})
            row["is_missing"] = float(clip["reason"] == Reason.MISSING)
            rows.append(row)
        return pa.Table.from_pylist(rows, MEASURED_SCHEMA)

    def _features(self, clips: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Signals of the stored features, by clip_id, read a row group at a time."""
        found: dict[str, dict[str, Any]] = {}
        for shard in dict.fromkeys(clip["shard"] for clip in clips if clip["shard"]):
            mine = sorted((c for c in clips if c["shard"] == shard), key=lambda clip: clip["row"])
            places_n = np.array([clip["row"] for clip in mine])
            pieces = by_row_group(places_n)
            tables = read_pieces(
                self.settings.store_uri, shard, [places_n[at] for at in pieces], _FEATURE_COLUMNS
            )
            for at, table in zip(pieces, tables, strict=True):
                for clip, row in zip(mine[at], table.to_pylist(), strict=True):
                    fbank_TM = fbank_array(row["fbank"], self.settings.spec)
                    arguments = (row["frames"], row["frame_ts_ms"], fbank_TM, row["fbank_frames"])
                    found[clip["clip_id"]] = measure_features(*arguments)._asdict()
        return found


def _by_processes(
    groups: list[list[dict[str, Any]]], settings: ScanSettings, n_workers: int
) -> Iterator[pa.Table]:
    """The same by processes; they are ended when the caller stops."""
    context = multiprocessing.get_context("spawn")
    tasks: Any = context.Queue()
    # Bounded: processes wait for whoever writes the results down.
    results: Any = context.Queue(maxsize=4 * n_workers)
    for group in groups:
        tasks.put(group)
    for _ in range(n_workers):
        tasks.put(None)
    workers = [
        context.Process(target=_work, args=(settings, tasks, results), daemon=True)
        for _ in range(n_workers)
    ]
    for worker in workers:
        worker.start()
    n_left = sum(map(len, groups))
    try:
        while n_left:
            measured = _next_result(results, workers)
            n_left -= len(measured)
            yield measured
    finally:
        for worker in workers:
            worker.terminate()


def _next_result(results: Any, workers: list[Any]) -> pa.Table:
    """Raises: what a worker raised; PipelineError if one died, or all ended before their work."""
    while True:
        # Asked before the queue is: a process that has ended has put all its results there.
        ended = all(worker.exitcode is not None for worker in workers)
        try:
            result = results.get(timeout=0.5)
        except queue.Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            if dead:
                raise PipelineError(
                    f"a process that measured clips ended with code {dead[0]}: is there memory "
                    "for one per core? What was measured is kept; run the same again."
                ) from None
            if ended:
                raise PipelineError(
                    "the processes that measured clips ended and left some out; this is a fault "
                    "of diccae. What was measured is kept; run the same again."
                ) from None
            continue
        if isinstance(result, BaseException):
            raise result
        return result


def _work(settings: ScanSettings, tasks: Any, results: Any) -> None:
    """A process: groups from one queue, measured chunks to the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends it.
    looker = _Looker(settings)
    try:
        while (group := tasks.get()) is not None:
            for measured in looker.measure(group):
                results.put(measured)
    except Exception as error:
        results.put(error)
    finally:
        looker.close()
