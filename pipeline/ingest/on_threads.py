"""run_shards for a few clips: decoders in threads of the driver, where a cluster would only delay.

Knows nothing of Ray. Invariant: the rows, bytes and faults are those of the same clips through Ray:
the decoders, their children and the waves are the same.
"""

import queue
import secrets
import threading
from collections.abc import Generator, Iterator

import pyarrow as pa

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.cores import usable_cores
from pipeline.decode.fbank_service import SharedFbanks
from pipeline.ingest.shard_decoder import Outcome, ShardDecoder
from pipeline.ingest.waves import run_waves
from pipeline.storage import Location
from pipeline.store.identity import store_id


def run_shards(
    store_uri: str, todo: pa.Table, spec: FeatureSpec, config: IngestConfig, run_id: str
) -> Iterator[pa.Table]:
    """Decode `todo` (Plan.todo). Yields rows of the clips table, a shard's at a time.

    Raises: PipelineError, as run_waves does.
    """
    n_workers = config.workers or usable_cores()
    expected_id = store_id(Location(store_uri))
    fbank_key = secrets.token_bytes()

    def decode(shards: list[pa.Table], wave_id: str) -> Generator[Outcome, None, None]:
        # Each thread decodes in a child of its own and waits for it: one process less than a
        # decoder in a process, and half a second of imports.
        workers = []
        for _ in range(min(n_workers, len(shards))):
            fbanks = SharedFbanks(spec, wave_id, fbank_key, is_attached=True)
            decoder = ShardDecoder(
                store_uri, spec, config, wave_id, fbanks, expected_id=expected_id
            )
            workers.append((decoder, fbanks))
        workers[0][1].prepare()
        return _outcomes(shards, workers)

    return run_waves(todo, config, run_id, n_workers, decode)


def _outcomes(
    shards: list[pa.Table], workers: list[tuple[ShardDecoder, SharedFbanks]]
) -> Generator[Outcome, None, None]:
    tasks: queue.SimpleQueue[tuple[int, pa.Table] | None] = queue.SimpleQueue()
    said: queue.SimpleQueue[Outcome | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()
    for task in [*enumerate(shards), *[None] * len(workers)]:
        tasks.put(task)
    threads = [
        threading.Thread(
            target=_work, args=(decoder, tasks, said, stop), name=f"decoder-{i}", daemon=True
        )
        for i, (decoder, _) in enumerate(workers)
    ]
    for thread in threads:
        thread.start()
    n_at_work = len(threads)
    try:
        while n_at_work:
            outcome = said.get()
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is None:
                n_at_work -= 1
            else:
                yield outcome
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for _, fbanks in workers:
            fbanks.close()


def _work(
    decoder: ShardDecoder,
    tasks: "queue.SimpleQueue[tuple[int, pa.Table] | None]",
    said: "queue.SimpleQueue[Outcome | BaseException | None]",
    stop: threading.Event,
) -> None:
    """Shards until there are none. The child dies with the thread that started it (Linux)."""
    try:
        while (task := tasks.get()) is not None:
            for outcome in decoder.outcomes(*task):
                if stop.is_set():
                    return
                said.put(outcome)
        said.put(None)
    except BaseException as error:
        said.put(error)
    finally:
        decoder.close()
