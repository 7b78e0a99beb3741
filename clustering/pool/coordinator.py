"""Coordinator: one round after the other: freezes the banks, clusters, publishes.

An asyncio Ray actor; knows nothing of training. Invariant: a round that was begun is finished or
raises, also by the successor of a coordinator that died: what it needs is on storage.
"""

import asyncio
import functools
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ray

from clustering import storage
from clustering.config import PoolConfig
from clustering.kmeans.share import Source
from clustering.pool.compute import RayPasses, results
from clustering.rounds.files import forget_vectors, is_complete, load_round, vectors_uri
from clustering.rounds.frozen import FrozenRows
from clustering.rounds.maker import RoundMaker
from clustering.rounds.protocol import RoundRequest
from clustering.rounds.saved import (
    MARKER,
    forget_later,
    forget_saved,
    kept_files,
    pools_at,
    remove_unnamed,
    together,
    write_saved,
)


class ActorNames(NamedTuple):
    """Whom a coordinator works with."""

    banks: list[str]
    compute: list[str]


class Coordinator:
    """Makes the rounds of a pool in one thread, while its event loop answers who waits."""

    def __init__(
        self, held: Sequence[Any], config: PoolConfig, folder: str, names: ActorNames
    ) -> None:
        """Args: held: [reference of the RoundMaker]; folder: of this pool's own state."""
        maker: RoundMaker = ray.get(held[0])
        self._maker, self._uri, self._config = maker, maker.uri, config
        # By name: handles among the arguments of an actor that restarts make Ray complain.
        self._banks = [ray.get_actor(name) for name in names.banks]
        self._actors = [ray.get_actor(name) for name in names.compute]
        # One thread: compute actors hold one share at a time.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="clustering")
        # Files are named by a saved state before they can be removed for a lack of one.
        self._naming = threading.Lock()
        self._rounds: dict[int, asyncio.Future[Any]] = {}
        # The marker tells a restarted coordinator from that of a new pool, which must not go on
        # with rounds of an earlier driver before they are asked for.
        self._pool_id = folder.rsplit("/", 1)[-1]
        marker = storage.join(folder, MARKER)
        restarted = storage.exists(marker)
        maker.may_write()
        storage.write_json(marker, maker.identity)
        self._orphans = maker.unfinished() if restarted else []

    async def start(self, request: RoundRequest) -> None:
        """Begin a round, or go on with it."""
        self._maker.begin(request)
        if self._maker.frozen(request.round) is None:
            # Before training goes on: the freeze may come late, after a restart of this actor.
            await asyncio.gather(*(bank.hold.remote(request.step) for bank in self._banks))
        self._adopt()
        self._schedule(request.round, lambda: self._make(request))

    async def wait(self, round: int, timeout_s: float) -> list[Any]:
        """[reference of the PublishedRound]; an empty list after the timeout."""
        self._adopt()
        if round not in self._rounds:
            self._resume(round)
        future = self._rounds.setdefault(round, asyncio.get_running_loop().create_future())
        done, _ = await asyncio.wait([future], timeout=timeout_s)
        return [future.result()] if done else []

    async def save(self, uri: str) -> None:
        """See `Rounds.save`."""
        await asyncio.to_thread(self._save, uri)

    async def forget_saved(self, keep: int) -> None:
        """See `Rounds.forget_saved`."""
        await asyncio.to_thread(self._forget, keep)

    async def forget_later(self, step: int) -> None:
        """See `Rounds.forget_later`."""
        await asyncio.to_thread(self._forget_later, step)

    def _save(self, uri: str) -> None:
        with self._naming:
            parts = results([bank.saved.remote() for bank in self._banks])
            self._maker.may_write()
            write_saved(uri, together(parts))

    def _forget(self, keep: int | None = None) -> None:
        """Remove saved states beyond `keep`, and what no state and no bank names."""
        with self._naming:
            self._maker.may_write()
            if keep is not None:
                forget_saved(self._uri, keep)
            kept = kept_files(self._uri)
            results([bank.forget.remote(kept) for bank in self._banks])
            living = together(results([bank.saved.remote() for bank in self._banks]))
            earlier = [pool for pool in pools_at(self._uri) if pool != self._pool_id]
            remove_unnamed(self._uri, kept.union(living.files), earlier)

    def _forget_later(self, step: int) -> None:
        with self._naming:
            self._maker.may_write()
            forget_later(self._uri, step)

    def _adopt(self) -> None:
        """After a restart of this actor: go on with what it had begun."""
        orphans, self._orphans = self._orphans, []
        for request in orphans:
            self._schedule(request.round, functools.partial(self._make, request))

    def _resume(self, round: int) -> None:
        """A round of an earlier pool: published, or frozen and not yet finished."""
        if is_complete(self._uri, round):
            self._schedule(round, lambda: ray.put(load_round(self._uri, round)))
            return
        request = self._maker.resumable(round)
        if request is not None:
            self._schedule(round, lambda: self._make(request))

    def _schedule(self, round: int, work: Callable[[], Any]) -> None:
        """Promise the round, and keep the promise by `work`, in its turn."""
        # A worker may still ask for the round before; older ones are read from storage.
        for old in [r for r, made in self._rounds.items() if r < round - 1 and made.done()]:
            del self._rounds[old]
        loop = asyncio.get_running_loop()
        promised = self._rounds.get(round)
        if promised is None or promised.done():
            promised = self._rounds[round] = loop.create_future()
        working = loop.run_in_executor(self._executor, work)
        working.add_done_callback(lambda made: _settle(promised, made))

    def _make(self, request: RoundRequest) -> Any:
        if is_complete(self._uri, request.round):
            self._release(request.step)
            return ray.put(load_round(self._uri, request.round))
        frozen = self._maker.frozen(request.round) or self._freeze(request)
        # Not by the freeze itself: a coordinator that dies before its manifest asks for it again.
        self._release(request.step)
        count = len(self._actors)
        sources: list[Source] = [frozen.source(index, count) for index in range(count)]
        passes = RayPasses(self._actors, sources, self._config.reducer, self._config.fan_in)
        published = self._maker.make(passes, frozen, request)
        self._forget()
        with self._naming:
            forget_vectors(self._uri, request.round, self._config.keep_vectors)
        return ray.put(published)

    def _freeze(self, request: RoundRequest) -> FrozenRows:
        folder, attempt = vectors_uri(self._uri, request.round), uuid.uuid4().hex
        parts = results(
            [
                # A name of its own: a saved state may name the part of an attempt that died.
                bank.freeze.remote(
                    storage.join(folder, f"part-{i:04d}-{attempt}.parquet"), request.step
                )
                for i, bank in enumerate(self._banks)
            ]
        )
        self._maker.may_write()
        return FrozenRows.commit(folder, tuple(parts), sum(self._maker.streams.values()))

    def _release(self, step: int) -> None:
        """See `Bank.release`; banks that were restored may wait for a freeze that has been."""
        results([bank.release.remote(step) for bank in self._banks])


def _settle(promised: "asyncio.Future[Any]", made: "asyncio.Future[Any]") -> None:
    if promised.done():
        return
    error = made.exception()
    if error is not None:
        promised.set_exception(error)
    else:
        promised.set_result(made.result())
