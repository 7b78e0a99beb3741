"""run_waves: the clips of a plan cut into shards, handed to decoders, until each came back once.

Knows nothing of where the decoders run. Invariant: each clip comes back exactly once, whatever
happened to a decoder meanwhile, or an error is raised.
"""

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import IngestConfig
from pipeline.errors import PipelineError
from pipeline.ingest.shard_decoder import Outcome
from pipeline.source.tar_parts import part_of

_FEWEST_CLIPS = 16
_SHARDS_PER_WORKER = 4
_MOST_WAVES = 3
_MOST_FAILURES = 3
"""Shards in a row that storage may fail, however few the decoders."""

_LOG = logging.getLogger(__name__)

DecodeWave = Callable[[list[pa.Table], str], Generator[Outcome, None, None]]
"""Decodes shards (Plan.todo) under a run id."""


def run_waves(
    todo: pa.Table, config: IngestConfig, run_id: str, n_workers: int, decode: DecodeWave
) -> Iterator[pa.Table]:
    """Decode `todo` (Plan.todo). Yields rows of the clips table, a shard's at a time.

    Raises: PipelineError if storage fails, if nothing is finished for stall_timeout_s, or if clips
    do not come back.
    """
    left = todo
    failures: list[str] = []
    for wave in range(_MOST_WAVES):
        if not len(left):
            return
        returned: set[str] = set()
        shards = list(cut_tasks(left, config.shard_clips, n_workers))
        outcomes = decode(shards, f"{run_id}-{wave}" if wave else run_id)
        most_failures = max(_MOST_FAILURES, 2 * min(n_workers, len(shards)))
        finished = _finished(outcomes, failures, most_failures)
        with contextlib.closing(_watched(finished, config.stall_timeout_s)) as watched:
            for states in watched:
                # A task that ran twice may hand out a clip again.
                ids = states["clip_id"].to_pylist()
                again = pa.array([clip_id in returned for clip_id in ids], pa.bool_())
                returned.update(ids)
                if (new := states.filter(pc.invert(again))).num_rows:
                    yield new
        done = pa.array(returned, pa.string())
        left = left.filter(pc.invert(pc.is_in(left["clip_id"], value_set=done)))
    if len(left) and failures:
        raise _storage_failed(failures)
    if len(left):
        raise PipelineError(
            f"{len(left)} clips (such as {left['clip_id'][0]}) did not come back from the decoders "
            f"in {_MOST_WAVES} tries. All others are committed; look at the Ray logs, run it again."
        )


def cut_tasks(clips: pa.Table, shard_clips: int, n_workers: int) -> Iterator[pa.Table]:
    """What one decoder does at a stretch: a shard's worth of clips, or all clips of a tar part."""
    parts = pa.array([part_of(uri) for uri in clips["uri"].to_pylist()], pa.string())
    for part in pc.unique(parts.drop_null()):
        yield clips.filter(pc.equal(parts, part).fill_null(False))
    yield from _cut_shards(clips.filter(pc.is_null(parts)), shard_clips, n_workers)


def _cut_shards(clips: pa.Table, shard_clips: int, n_workers: int) -> Iterator[pa.Table]:
    """Clips in the order of a hash of their id, so that each shard is a mix of classes.

    Shards are smaller when there are few clips, so that no worker waits long for the last one.
    """
    keys = [
        hashlib.blake2b(clip_id.encode(), digest_size=8).digest()
        for clip_id in clips["clip_id"].to_pylist()
    ]
    clips = clips.take(np.argsort(np.array(keys, "S8"), kind="stable")).combine_chunks()
    fair = -(-len(clips) // (_SHARDS_PER_WORKER * n_workers))
    n = min(shard_clips, max(_FEWEST_CLIPS, fair))
    for start in range(0, len(clips), n):
        yield clips.slice(start, n)


def _finished(
    outcomes: Generator[Outcome, None, None], failures: list[str], most_failures: int
) -> Generator[pa.Table, None, None]:
    """Rows of shards that are finished; none as a sign of life. `failures`: what storage said of
    the shards it failed in a row."""
    with contextlib.closing(outcomes):
        for outcome in outcomes:
            if outcome.refused:
                raise PipelineError(f"{outcome.refused} Shards finished before are committed.")
            if outcome.error:
                failures.append(outcome.error)
                # A blink of the storage fails a shard of each decoder; its clips go into the next
                # wave.
                if len(failures) >= most_failures:
                    raise _storage_failed(failures)
                _LOG.warning("a shard failed, its clips are tried again: %s", outcome.error)
            elif outcome.states is not None:
                if len(outcome.states):
                    failures.clear()
                yield outcome.states


def _storage_failed(failures: list[str]) -> PipelineError:
    return PipelineError(
        f"{len(failures)} shards in a row could not be written or their clips not be read: "
        f"{failures[-1]}. Shards finished before are committed. Mend the storage, then run the "
        "same again."
    )


def _watched(
    results: Generator[pa.Table, None, None], stall_timeout_s: float
) -> Generator[pa.Table, None, None]:
    """The same results, by a thread, so that signals and a stalled cluster are noticed."""
    arrived: queue.Queue[pa.Table | BaseException | None] = queue.Queue(maxsize=64)
    stop = threading.Event()

    def pump() -> None:
        try:
            with contextlib.closing(results):
                for result in results:
                    arrived.put(result)
                    if stop.is_set():
                        return
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    threading.Thread(target=pump, name="ingest-results", daemon=True).start()
    try:
        yield from _until_end(arrived, stall_timeout_s)
    except KeyboardInterrupt:
        while not arrived.empty():
            result = arrived.get_nowait()
            if isinstance(result, pa.Table):
                yield result
        raise
    finally:
        stop.set()


def _until_end(arrived: "queue.Queue[Any]", stall_timeout_s: float) -> Iterator[pa.Table]:
    deadline = time.monotonic() + stall_timeout_s
    while True:
        try:
            # Short waits: a signal interrupts between them.
            result = arrived.get(timeout=0.5)
        except queue.Empty:
            if time.monotonic() > deadline:
                raise PipelineError(
                    f"no clip was finished for {stall_timeout_s:.0f} s. Finished shards are "
                    'committed. See "ray status": are there free CPUs for the decode actors?'
                ) from None
            continue
        deadline = time.monotonic() + stall_timeout_s
        if result is None:
            return
        if isinstance(result, PipelineError):
            raise result
        if isinstance(result, BaseException):
            raise PipelineError(f"the decoders failed: {result}") from result
        yield result
