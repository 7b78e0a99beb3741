"""run_shards for many clips: decode actors of Ray Data.

Knows nothing of the clips table or of what is done when a shard fails (waves does). Invariant: what
a decoder says arrives as it was said, and an actor that is at work is heard of.
"""

import logging
import math
import random
import secrets
import time
from collections.abc import Generator, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.decode.fbank_service import CPUS_PER_SERVICE, SharedFbanks
from pipeline.ingest.shard_decoder import Outcome, ShardDecoder
from pipeline.ingest.waves import run_waves
from pipeline.storage import Location
from pipeline.store.identity import store_id

_LIFE_EVERY_S = 10.0
"""How often an actor says that it is at work: a shard of slow clips takes longer than the driver
waits for a sign, and a sign costs a few ms."""


def run_shards(
    store_uri: str, todo: pa.Table, spec: FeatureSpec, config: IngestConfig, run_id: str
) -> Iterator[pa.Table]:
    """Decode `todo` (Plan.todo). Yields rows of the clips table, a shard's at a time.

    Raises: PipelineError, as run_waves does.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    n_there = max(1, int(ray.cluster_resources().get("CPU", 1)))
    n_workers = config.workers or n_there
    arguments = {
        "store_uri": store_uri,
        "spec": spec,
        "config": config,
        "fbank_key": secrets.token_bytes(),
        "expected_id": store_id(Location(store_uri)),
    }

    def decode(shards: list[pa.Table], wave_id: str) -> Generator[Outcome, None, None]:
        # Nodes may come while it works: an autoscaler starts them for the actors that wait.
        most = min(config.workers or len(shards), len(shards))
        pool = ActorPoolStrategy(min_size=min(n_there, most), max_size=most)
        return _outcomes(shards, pool, {**arguments, "run_id": wave_id}, config)

    return run_waves(todo, config, run_id, n_workers, decode)


class _DecodeActor(ShardDecoder):
    """A ShardDecoder as Ray Data calls it."""

    def __init__(
        self,
        store_uri: str,
        spec: FeatureSpec,
        config: IngestConfig,
        run_id: str,
        *,
        fbank_key: bytes,
        expected_id: str | None,
    ) -> None:
        fbanks = SharedFbanks(spec, f"{run_id}-{_pick_service()}", fbank_key)
        super().__init__(store_uri, spec, config, run_id, fbanks, expected_id=expected_id)
        self._life_every_s = min(_LIFE_EVERY_S, config.stall_timeout_s / 4)

    def __call__(self, task: pa.Table) -> Iterator[pa.Table]:
        """Tasks (index, clips as IPC) to results (states as IPC, error, refused)."""
        for index, clips in zip(task["index"].to_pylist(), task["clips"].to_pylist(), strict=True):
            said_at = time.monotonic()
            for outcome in self.outcomes(index, _table_from_bytes(clips)):
                is_sign_of_life = outcome.states is not None and not len(outcome.states)
                if is_sign_of_life and time.monotonic() - said_at < self._life_every_s:
                    continue
                said_at = time.monotonic()
                yield _result(outcome)


def _pick_service() -> str:
    """One of the fbank services of this node."""
    node = ray.get_runtime_context().get_node_id()
    cpus = next((one["Resources"].get("CPU", 1) for one in ray.nodes() if one["NodeID"] == node), 1)
    return f"{node}-{random.randrange(max(1, math.ceil(cpus / CPUS_PER_SERVICE)))}"


def _result(outcome: Outcome) -> pa.Table:
    states = b"" if outcome.states is None else _table_to_bytes(outcome.states)
    return pa.table({"states": [states], "error": [outcome.error], "refused": [outcome.refused]})


def _outcomes(
    shards: list[pa.Table],
    pool: ActorPoolStrategy,
    arguments: dict[str, Any],
    config: IngestConfig,
) -> Generator[Outcome, None, None]:
    rows = [{"index": i, "clips": _table_to_bytes(shard)} for i, shard in enumerate(shards)]
    with DataContext.current(_own_context()):
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _DecodeActor,
            fn_constructor_kwargs=arguments,
            batch_size=1,
            batch_format="pyarrow",
            compute=pool,
            num_cpus=config.cpus_per_worker,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        )
    for block in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in block.to_pylist():
            states = _table_from_bytes(row["states"]) if row["states"] else None
            yield Outcome(states, row["error"], row["refused"])


def _own_context() -> DataContext:
    """Settings of this data set alone: whatever else this process reads keeps its own."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Each result is handed out at once instead of with the rest of its task.
    context.target_max_block_size = 1
    context.target_min_block_size = 1
    return context


def _table_to_bytes(table: pa.Table) -> bytes:
    """A table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _table_from_bytes(data: bytes) -> pa.Table:
    """The inverse of _table_to_bytes."""
    return pa.ipc.open_stream(data).read_all()
