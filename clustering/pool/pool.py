"""ClusterPool: starts and stops the Ray actors of one run: banks, compute actors, coordinator.

Knows nothing of what they do with rows. Invariant: the same bits as rounds.local, for any number of
actors, any reducer, and actors killed at any moment: what a call needs is on storage or among its
arguments, so every call is retried until it succeeds.

`uri` is storage that all nodes reach. Actors belong to the driver and end with it; a round that was
frozen before the driver died goes on from its last iteration when it is asked for again.
"""

import uuid
from collections.abc import Mapping
from typing import Any

import ray

from clustering import storage
from clustering.config import KMeansConfig, PoolConfig
from clustering.pool.bank_actor import BankActor
from clustering.pool.client import PoolClient
from clustering.pool.compute import FOREVER, compute_actors, stop
from clustering.pool.coordinator import ActorNames, Coordinator
from clustering.rounds.frozen import Owner
from clustering.rounds.given import Given
from clustering.rounds.maker import RoundMaker
from clustering.rounds.saved import POOLS, kept_files, pools_at, remove_unnamed


class ClusterPool:
    """The actors of one run. Ray must be initialised; `close` or the driver's end stops them."""

    def __init__(
        self,
        kmeans: KMeansConfig,
        config: PoolConfig,
        streams: Mapping[str, int],
        uri: str,
        seed: int = 0,
        *,
        given: Given | None = None,
        may_write: storage.MayWrite = storage.always,
    ) -> None:
        """Args: as `LocalRounds`; `uri` must be reachable from all nodes. may_write: what the
        actors ask before each file."""
        may_write()
        self._may_write = may_write
        self._kmeans, self._config, self._streams = kmeans, config, dict(streams)
        # Rows of an earlier driver's banks can only be restored through a saved state.
        remove_unnamed(uri, kept_files(uri), pools_at(uri))
        # Names that no other pool of this cluster has: actors find each other by them.
        pool_id = uuid.uuid4().hex
        self._uri, self._pool_id = uri, pool_id
        folder = self._folder = storage.join(uri, POOLS, pool_id)
        groups = config.groups(kmeans)
        names = ActorNames(
            banks=[f"{pool_id}-bank-{i}" for i in range(groups.banks.n)],
            compute=[f"{pool_id}-compute-{i}" for i in range(groups.compute.n)],
        )
        # Held here: given labels of many clips are no argument that Ray keeps for a restart
        # (ray-project/ray issue 53727).
        self._maker = ray.put(
            RoundMaker(kmeans, self._streams, uri, seed, given, may_write=may_write)
        )
        self.banks = [self._bank(i, names.banks, groups.banks.cpus) for i in range(groups.banks.n)]
        self.actors = compute_actors(kmeans, groups.compute, names.compute)
        self.coordinator = (
            ray.remote(Coordinator)
            .options(num_cpus=groups.coordinator.cpus, **FOREVER)
            .remote([self._maker], config, folder, names)
        )

    def _bank(self, index: int, names: list[str], cpus: float) -> Any:
        folder = storage.join(self._folder, names[index])
        return (
            ray.remote(BankActor)
            .options(num_cpus=cpus, name=names[index], **FOREVER)
            .remote(
                Owner(index, len(names), self._kmeans.vshards),
                folder,
                self._uri,
                self._streams,
                may_write=self._may_write,
            )
        )

    def client(self) -> PoolClient:
        """A `Rounds` for a training worker; picklable."""
        return PoolClient(
            self._kmeans.vshards, self._config, self._streams, self.banks, self.coordinator
        )

    def close(self) -> None:
        """Stop the actors and remove what the banks wrote, but for what saved states name.

        Removes nothing, and raises what `may_write` does, where that is refused.
        """
        stop([self.coordinator, *self.actors, *self.banks])
        self._may_write()
        remove_unnamed(self._uri, kept_files(self._uri), [self._pool_id])
