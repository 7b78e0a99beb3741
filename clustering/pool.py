"""Rounds over Ray actors: banks take pushes, compute actors read the frozen snapshot.

Invariant: the same bits as clustering.local, for any number of actors, any reducer, and actors
killed at any moment: what a call needs is on storage or among its arguments, so every call is
retried until it succeeds.

`uri` is storage that all nodes reach. Actors belong to the driver and end with it; a round that was
frozen before the driver died goes on from its last iteration when it is asked for again.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayTaskError

from clustering import storage
from clustering.bank import BankRows, check_push
from clustering.bank_actor import BankActor
from clustering.client import Sender
from clustering.config import ClusteringConfig
from clustering.errors import ClusteringError, RoundTimeout
from clustering.making import RoundMaker, identity
from clustering.passes import Passes, Sums, merge
from clustering.publish import begin, forget_vectors, is_complete, load_round, round_uri, unfinished
from clustering.rounds import BankStats, PublishedRound, RoundRequest
from clustering.shares import Share, Source
from clustering.snapshot import Snapshot

_FOREVER: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
_TREE_ABOVE = 16


class ComputeActor:
    """Passes over one share at a time; a restart only costs reading it again."""

    def __init__(self, block_rows: int, device: Literal["cpu", "cuda"]) -> None:
        self._block_rows, self._device = block_rows, device
        self._token = ""
        self._share: Share | None = None

    def run(self, source: Source, method: str, *args: Any) -> Any:
        """Call a method of `Share` on the share of `source`."""
        if self._share is None or self._token != source.token:
            self._share = None
            self._share = Share(source, self._block_rows, self._device)
            self._token = source.token
        return getattr(self._share, method)(*args)

    def merge(self, *parts: Sums) -> Sums:
        """Partial sums added."""
        return merge(list(parts))


class RayPasses(Passes):
    """Passes over shares that compute actors hold, one share each."""

    def __init__(
        self, actors: list[Any], sources: list[Source], reducer: str = "auto", fan_in: int = 8
    ) -> None:
        self._actors = actors
        self._sources = sources
        self._tree = reducer == "tree" or (reducer == "auto" and len(actors) > _TREE_ABOVE)
        self._fan_in = fan_in

    def share_out(self, value: Any) -> Any:
        """One copy per node in the object store."""
        return ray.put(value)

    def gather(self, method: str, *args: Any) -> list[Any]:
        """See `Passes.gather`."""
        return unwrapped(lambda: ray.get(self._submit(method, args)))

    def reduce(self, method: str, *args: Any) -> Sums:
        """See `Passes.reduce`: folded as the parts arrive, or in a tree on the actors."""
        references = self._submit(method, args)
        while self._tree and len(references) > 1:
            starts = range(0, len(references), self._fan_in)
            references = [
                self._actors[start].merge.remote(*references[start : start + self._fan_in])
                for start in starts
            ]
        return unwrapped(lambda: _fold(references))

    def _submit(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        return [
            actor.run.remote(source, method, *args)
            for actor, source in zip(self._actors, self._sources, strict=True)
        ]


def _fold(references: list[Any]) -> Sums:
    total: Sums | None = None
    while references:
        ready, references = ray.wait(references, num_returns=1)
        part = ray.get(ready[0])
        if total is None:
            total = tuple(array.copy() for array in part)
        else:
            for array, addend in zip(total, part, strict=True):
                array += addend
    assert total is not None
    return total


def unwrapped(call: Callable[[], Any]) -> Any:
    """Raise an actor's ClusteringError itself, without Ray's envelope."""
    try:
        return call()
    except RayTaskError as error:
        if isinstance(error.cause, ClusteringError):
            raise error.cause from None
        raise


def compute_actors(config: ClusteringConfig, count: int) -> list[Any]:
    """Compute actors that restart and retry for ever."""
    remote = ray.remote(ComputeActor).options(
        num_cpus=config.cpus_per_actor, num_gpus=config.gpus_per_actor, **_FOREVER
    )
    return [remote.remote(config.block_rows, config.device) for _ in range(count)]


class Coordinator:
    """Freezes, clusters and publishes one round after the other; an asyncio actor."""

    def __init__(
        self,
        config: ClusteringConfig,
        streams: Mapping[str, int],
        uri: str,
        seed: int,
        banks: list[Any],
        actors: list[Any],
    ) -> None:
        self._config = config
        self._uri = uri
        self._width = sum(streams.values())
        self._identity = identity(config, streams, seed)
        self._maker = RoundMaker(config, streams, uri, seed)
        self._banks, self._actors = banks, actors
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="clustering")
        self._rounds: dict[int, asyncio.Future[Any]] = {}
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._orphans = unfinished(uri, self._identity)
        else:
            self._orphans = []

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
            folder = storage.join(round_uri(self._uri, round), "vectors")
            if request.round == round and Snapshot.load(folder) is not None:
                self._schedule(request)

    def _schedule(self, request: RoundRequest) -> None:
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
        folder = storage.join(round_uri(self._uri, request.round), "vectors")
        stored = Snapshot.load(folder)
        if stored is not None:
            return stored
        parts = ray.get(
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


class PoolClient:
    """Implements `Rounds` against a pool; pickles as handles, so each worker buffers for itself."""

    def __init__(
        self,
        config: ClusteringConfig,
        streams: Mapping[str, int],
        banks: list[Any],
        coordinator: Any,
    ) -> None:
        self._config, self._streams = config, dict(streams)
        self._banks, self._coordinator = banks, coordinator
        self._sender: Sender | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the rows that wait in this process."""
        return PoolClient, (self._config, self._streams, self._banks, self._coordinator)

    def push(self, keys_B: np.ndarray, features_BW: np.ndarray, step: int) -> None:
        """See `Rounds.push`."""
        keys, rows = check_push(keys_B, features_BW, self._streams)
        steps = np.full(len(keys), step, dtype=np.int64)
        self._sending().push(BankRows(keys, steps, rows))

    def flush(self, timeout_s: float) -> None:
        """See `Rounds.flush`."""
        self._sending().flush(timeout_s)

    def start(self, request: RoundRequest) -> None:
        """See `Rounds.start`."""
        unwrapped(lambda: ray.get(self._coordinator.start.remote(request)))

    def wait(self, round: int, timeout_s: float) -> PublishedRound:
        """See `Rounds.wait`."""
        while True:
            found = unwrapped(lambda: ray.get(self._coordinator.wait.remote(round, timeout_s)))
            if not found:
                raise RoundTimeout(
                    f"round {round} is not ready after {timeout_s:g} s. Raise rounds.timeout_s, or "
                    "make rounds cheaper: more clustering.n_actors, fewer iterations, "
                    "clustering.max_points_per_centroid."
                )
            try:
                return ray.get(found[0])
            except ObjectLostError:
                # The coordinator died after it had answered; its successor reads from storage.
                continue

    def save(self, uri: str) -> None:
        """See `Rounds.save`."""
        ray.get([bank.save.remote(uri) for bank in self._banks])

    def restore(self, uri: str) -> None:
        """See `Rounds.restore`."""
        unwrapped(lambda: ray.get([bank.restore.remote(uri) for bank in self._banks]))

    def stats(self) -> BankStats:
        """See `Rounds.stats`."""
        ages = [age for age in ray.get([bank.ages.remote() for bank in self._banks])]
        held = [age for age in ages if age[0]]
        rows = sum(age[0] for age in held)
        newest = max((age[3] for age in held), default=0)
        oldest = min((age[2] for age in held), default=0)
        age_mean = newest - sum(age[1] for age in held) / rows if rows else 0.0
        dropped = self._sender.dropped if self._sender else 0
        return BankStats(rows, dropped, age_mean, newest - oldest, sum(age[4] for age in ages))

    def _sending(self) -> Sender:
        if self._sender is None:
            self._sender = Sender(
                self._banks,
                self._config.vshards,
                self._config.coalesce_rows,
                self._config.coalesce_s,
                self._config.buffer_rows,
            )
        return self._sender


class ClusterPool:
    """The actors of one run. Ray must be initialised; `close` or the driver's end stops them."""

    def __init__(
        self, config: ClusteringConfig, streams: Mapping[str, int], uri: str, seed: int = 0
    ) -> None:
        """Args: as `LocalRounds`; `uri` must be reachable from all nodes."""
        self._config, self._streams = config, dict(streams)
        # What an earlier driver's banks kept can only be restored through a checkpoint.
        storage.remove(storage.join(uri, "bank"))
        folder = self._folder = storage.join(uri, "bank", uuid.uuid4().hex)
        bank = ray.remote(BankActor).options(num_cpus=config.cpus_per_bank, **_FOREVER)
        count = config.bank_actors
        self.banks = [
            bank.remote(i, count, storage.join(folder, f"{i:04d}"), self._streams, config.vshards)
            for i in range(count)
        ]
        self.actors = compute_actors(config, config.n_actors)
        self.coordinator = (
            ray.remote(Coordinator)
            .options(num_cpus=config.cpus_per_bank, **_FOREVER)
            .remote(config, self._streams, uri, seed, self.banks, self.actors)
        )

    def client(self) -> PoolClient:
        """A `Rounds` for a training worker; picklable."""
        return PoolClient(self._config, self._streams, self.banks, self.coordinator)

    def close(self) -> None:
        """Stop the actors and remove what the banks kept for their own restart."""
        for actor in (self.coordinator, *self.actors, *self.banks):
            ray.kill(actor)
        storage.remove(self._folder)
