"""One round after the other: freeze the banks, cluster on the compute actors, publish.

An asyncio Ray actor. Invariant: a round that was begun is finished or raises, also by the successor
of a coordinator that died: what it needs is on storage.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from clustering import storage
from clustering.config import ClusteringConfig
from clustering.kmeans.passes import Table
from clustering.kmeans.share import Source
from clustering.pool.compute import RayPasses, results
from clustering.rounds.files import (
    begin,
    forget_vectors,
    is_complete,
    load_round,
    unfinished,
    vectors_uri,
)
from clustering.rounds.maker import RoundMaker, identity
from clustering.rounds.protocol import RoundRequest
from clustering.rounds.snapshot import Snapshot


class Coordinator:
    """Freezes, clusters and publishes one round after the other; an asyncio actor."""

    def __init__(
        self,
        config: ClusteringConfig,
        streams: Mapping[str, int],
        uri: str,
        seed: int,
        folder: str,
        names: tuple[list[str], list[str]],
        given: Table | None,
    ) -> None:
        """Args: folder: where this pool keeps its own state; names of bank and compute actors."""
        self._config = config
        self._uri = uri
        self._width = sum(streams.values())
        self._identity = identity(config, streams, seed, given)
        self._maker = RoundMaker(config, streams, uri, seed, given)
        # By name: handles among the arguments of an actor that restarts make Ray complain.
        self._banks, self._actors = ([ray.get_actor(name) for name in group] for group in names)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="clustering")
        self._rounds: dict[int, asyncio.Future[Any]] = {}
        marker = storage.join(folder, "coordinator.json")
        restarted = storage.exists(marker)
        storage.write_json(marker, self._identity)
        self._orphans = unfinished(uri, self._identity) if restarted else []

    async def start(self, request: RoundRequest) -> None:
        """Begin a round, or go on with it."""
        begin(self._uri, request, self._identity)
        self._adopt()
        self._schedule(request)

    async def wait(self, round: int, timeout_s: float) -> list[Any]:
        """[reference of the PublishedRound]; an empty list after the timeout."""
        self._adopt()
        if round not in self._rounds:
            self._resume(round)
        future = self._rounds.setdefault(round, asyncio.get_running_loop().create_future())
        done, _ = await asyncio.wait([future], timeout=timeout_s)
        return [future.result()] if done else []

    def _adopt(self) -> None:
        """After a restart of this actor: go on with what it had begun."""
        orphans, self._orphans = self._orphans, []
        for request in orphans:
            self._schedule(request)

    def _resume(self, round: int) -> None:
        """A round of an earlier pool: published, or frozen and not yet finished."""
        if is_complete(self._uri, round):
            self._schedule(RoundRequest(round, 0, 0))
            return
        for request in unfinished(self._uri, self._identity):
            frozen = Snapshot.load(vectors_uri(self._uri, round)) is not None
            if request.round == round and frozen:
                self._schedule(request)

    def _schedule(self, request: RoundRequest) -> None:
        # A worker may still ask for the round before; older ones are read from storage.
        for old in [r for r, made in self._rounds.items() if r < request.round - 1 and made.done()]:
            del self._rounds[old]
        loop = asyncio.get_running_loop()
        promised = self._rounds.get(request.round)
        if promised is None or promised.done():
            promised = self._rounds[request.round] = loop.create_future()
        work = loop.run_in_executor(self._executor, self._make, request)
        work.add_done_callback(lambda made: _settle(promised, made))

    def _make(self, request: RoundRequest) -> Any:
        if is_complete(self._uri, request.round):
            return ray.put(load_round(self._uri, request.round))
        snapshot = self._freeze(request)
        count = len(self._actors)
        sources: list[Source] = [snapshot.source(index, count) for index in range(count)]
        passes = RayPasses(self._actors, sources, self._config.reducer, self._config.fan_in)
        published = self._maker.make(passes, snapshot, request)
        forget_vectors(self._uri, request.round, self._config.keep_vectors)
        return ray.put(published)

    def _freeze(self, request: RoundRequest) -> Snapshot:
        folder = vectors_uri(self._uri, request.round)
        stored = Snapshot.load(folder)
        if stored is not None:
            return stored
        parts = results(
            [
                bank.freeze.remote(storage.join(folder, f"part-{i:04d}.parquet"), request.step)
                for i, bank in enumerate(self._banks)
            ]
        )
        snapshot = Snapshot(folder, tuple(parts), self._width)
        snapshot.write_manifest()
        return snapshot


def _settle(promised: "asyncio.Future[Any]", made: "asyncio.Future[Any]") -> None:
    if promised.done():
        return
    error = made.exception()
    if error is not None:
        promised.set_exception(error)
    else:
        promised.set_result(made.result())
