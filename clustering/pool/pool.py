"""Rounds over Ray actors: banks take pushes, compute actors read the frozen snapshot.

Invariant: the same bits as rounds.local, for any number of actors, any reducer, and actors
killed at any moment: what a call needs is on storage or among its arguments, so every call is
retried until it succeeds.

`uri` is storage that all nodes reach. Actors belong to the driver and end with it; a round that was
frozen before the driver died goes on from its last iteration when it is asked for again.
"""

import uuid
from collections.abc import Mapping
from typing import Any

import ray

from clustering import storage
from clustering.config import ClusteringConfig
from clustering.kmeans.passes import Table
from clustering.pool.bank_actor import BankActor
from clustering.pool.client import PoolClient
from clustering.pool.compute import FOREVER, compute_actors, stop
from clustering.pool.coordinator import Coordinator


class ClusterPool:
    """The actors of one run. Ray must be initialised; `close` or the driver's end stops them."""

    def __init__(
        self,
        config: ClusteringConfig,
        streams: Mapping[str, int],
        uri: str,
        seed: int = 0,
        given: Table | None = None,
    ) -> None:
        """Args: as `LocalRounds`; `uri` must be reachable from all nodes."""
        self._config, self._streams = config, dict(streams)
        # What an earlier driver's banks kept can only be restored through a checkpoint.
        storage.remove(storage.join(uri, "bank"))
        folder = self._folder = storage.join(uri, "bank", uuid.uuid4().hex)
        prefix = folder.rsplit("/", 1)[-1]
        names = [f"{prefix}-bank-{i}" for i in range(config.bank_actors)]
        actor_names = [f"{prefix}-compute-{i}" for i in range(config.n_actors)]
        self.banks = [self._bank(i, names) for i in range(len(names))]
        self.actors = compute_actors(config, config.n_actors, actor_names)
        self.coordinator = (
            ray.remote(Coordinator)
            .options(num_cpus=config.cpus_per_bank, **FOREVER)
            .remote(config, self._streams, uri, seed, folder, (names, actor_names), given)
        )

    def _bank(self, index: int, names: list[str]) -> Any:
        options = {"num_cpus": self._config.cpus_per_bank, "name": names[index], **FOREVER}
        return (
            ray.remote(BankActor)
            .options(**options)
            .remote(
                index,
                len(names),
                storage.join(self._folder, names[index]),
                self._streams,
                self._config.vshards,
            )
        )

    def client(self) -> PoolClient:
        """A `Rounds` for a training worker; picklable."""
        return PoolClient(self._config, self._streams, self.banks, self.coordinator)

    def close(self) -> None:
        """Stop the actors and remove what the banks kept for their own restart."""
        stop([self.coordinator, *self.actors, *self.banks])
        storage.remove(self._folder)
