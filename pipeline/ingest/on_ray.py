"""A plan's clips through decode actors of Ray Data, shard by shard.

Knows nothing of the clips table. Invariant: each clip comes back exactly once, whatever happened to
actors and workers meanwhile, or an error is raised.
"""

import hashlib
import logging
import math
import queue
import random
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.decode.fbank_service import CPUS_PER_SERVICE, SharedFbanks
from pipeline.errors import PipelineError
from pipeline.ingest.shard_decoder import ShardDecoder, table_from_bytes, table_to_bytes
from pipeline.source.fetch import part_of
from pipeline.storage import is_storage_failure

_FEWEST_CLIPS = 16
_SHARDS_PER_WORKER = 4
_MOST_WAVES = 3
_MOST_FAILURES = 3
"""Shards in a row that storage may fail, however few the actors."""
_PAUSE_S = 2.0
"""What an actor waits after storage has failed it: a short outage would otherwise fail every shard
before the first failure is heard of."""

_LOG = logging.getLogger(__name__)


def run_shards(
    store_uri: str,
    todo: pa.Table,
    spec: FeatureSpec,
    config: IngestConfig,
    run_id: str,
) -> Iterator[pa.Table]:
    """Decode `todo` (Plan.todo). Yields rows of the clips table, a shard's at a time.

    Raises: PipelineError if storage fails, if nothing is finished for stall_timeout_s, or if clips
    do not come back.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    n_workers = config.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    fbank_key = secrets.token_bytes()
    left = todo
    failures: list[str] = []
    for wave in range(_MOST_WAVES):
        if not len(left):
            return
        returned: set[str] = set()
        shards = list(cut_tasks(left, config.shard_clips, n_workers))
        arguments = {
            "store_uri": store_uri,
            "spec": spec,
            "config": config,
            "run_id": f"{run_id}-{wave}" if wave else run_id,
            "fbank_key": fbank_key,
        }
        n_actors = min(n_workers, len(shards))
        results = _results(shards, n_actors, arguments, config, failures)
        for states in _watched(results, config.stall_timeout_s):
            # A task that ran twice may hand out a clip again.
            ids = states["clip_id"].to_pylist()
            yield states.filter(pa.array([clip_id not in returned for clip_id in ids]))
            returned.update(ids)
        done = pa.array(returned, pa.string())
        left = left.filter(pc.invert(pc.is_in(left["clip_id"], value_set=done)))
    if len(left) and failures:
        raise _storage_failed(failures)
    if len(left):
        raise PipelineError(
            f"{len(left)} clips (such as {left['clip_id'][0]}) did not come back from the cluster "
            f"in {_MOST_WAVES} tries. All others are committed; look at the Ray logs, run it again."
        )


def cut_tasks(clips: pa.Table, shard_clips: int, n_workers: int) -> Iterator[pa.Table]:
    """What one actor does at a stretch: a shard's worth of clips, or all clips of a tar part."""
    parts = pa.array([part_of(uri) for uri in clips["uri"].to_pylist()], pa.string())
    for part in pc.unique(parts.drop_null()):
        yield clips.filter(pc.equal(parts, part).fill_null(False))
    yield from cut_shards(clips.filter(pc.is_null(parts)), shard_clips, n_workers)


def cut_shards(clips: pa.Table, shard_clips: int, n_workers: int) -> Iterator[pa.Table]:
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


class _DecodeActor(ShardDecoder):
    """A ShardDecoder as Ray Data calls it."""

    def __init__(
        self,
        store_uri: str,
        spec: FeatureSpec,
        config: IngestConfig,
        run_id: str,
        fbank_key: bytes,
    ) -> None:
        fbanks = SharedFbanks(spec, f"{run_id}-{_pick_service()}", fbank_key)
        super().__init__(store_uri, spec, config, run_id, fbanks)

    def __call__(self, task: pa.Table) -> Iterator[pa.Table]:
        """Tasks (index, clips as IPC) to results (index, states as IPC, error)."""
        for index, clips in zip(task["index"].to_pylist(), task["clips"].to_pylist(), strict=True):
            try:
                for states in self.decode(index, table_from_bytes(clips)):
                    yield _result(index, table_to_bytes(states), "")
            except Exception as failure:
                if not is_storage_failure(failure):
                    raise
                yield _result(index, b"", f"{type(failure).__name__}: {failure}")
                time.sleep(_PAUSE_S)


def _pick_service() -> str:
    """One of the fbank services of this node."""
    node = ray.get_runtime_context().get_node_id()
    cpus = next((one["Resources"].get("CPU", 1) for one in ray.nodes() if one["NodeID"] == node), 1)
    return f"{node}-{random.randrange(max(1, math.ceil(cpus / CPUS_PER_SERVICE)))}"


def _result(index: int, states: bytes, error: str) -> pa.Table:
    return pa.table({"index": [index], "states": [states], "error": [error]})


def _results(
    shards: list[pa.Table],
    n_actors: int,
    arguments: dict[str, Any],
    config: IngestConfig,
    failures: list[str],
) -> Iterator[pa.Table]:
    """Finished shards. `failures` holds what storage said of the shards that failed in a row."""
    rows = [{"index": i, "clips": table_to_bytes(shard)} for i, shard in enumerate(shards)]
    with DataContext.current(_own_context()):
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _DecodeActor,
            fn_constructor_kwargs=arguments,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=n_actors),
            num_cpus=config.cpus_per_worker,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        )
    for block in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for error, states in zip(
            block["error"].to_pylist(), block["states"].to_pylist(), strict=True
        ):
            if not error:
                failures.clear()
                yield table_from_bytes(states)
                continue
            failures.append(error)
            # A blink of the storage fails a shard of each actor; its clips go into the next wave.
            if len(failures) >= max(_MOST_FAILURES, 2 * n_actors):
                raise _storage_failed(failures)
            _LOG.warning("a shard failed, its clips are tried again: %s", error)


def _storage_failed(failures: list[str]) -> PipelineError:
    return PipelineError(
        f"{len(failures)} shards in a row could not be written or their clips not be read: "
        f"{failures[-1]}. Shards finished before are committed. Mend the storage, then run the "
        "same again."
    )


def _watched(results: Iterator[pa.Table], stall_timeout_s: float) -> Iterator[pa.Table]:
    """The same results, by a thread, so that signals and a stalled cluster are noticed."""
    arrived: queue.Queue[pa.Table | BaseException | None] = queue.Queue(maxsize=64)
    stop = threading.Event()

    def pump() -> None:
        try:
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
                    f"no shard was finished for {stall_timeout_s:.0f} s. Finished ones are "
                    'committed. See "ray status": are there free CPUs for the decode actors?'
                ) from None
            continue
        deadline = time.monotonic() + stall_timeout_s
        if result is None:
            return
        if isinstance(result, PipelineError):
            raise result
        if isinstance(result, BaseException):
            raise PipelineError(f"the Ray job failed: {result}") from result
        yield result


def _own_context() -> DataContext:
    """Settings of this data set alone: whatever else this process reads keeps its own."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Each result is handed out at once instead of with the rest of its task.
    context.target_max_block_size = 1
    context.target_min_block_size = 1
    return context
