"""What a training worker holds of a pool.

Knows Ray only as handles of the pool's actors. Invariant: rows wait only in the process that pushed
them; a pickled client starts without any.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from clustering.config import ClusteringConfig
from clustering.errors import RoundTimeout
from clustering.pool.compute import unwrapped
from clustering.pool.sender import Sender
from clustering.rounds.bank import BankRows, check_push
from clustering.rounds.protocol import BankStats, PublishedRound, RoundRequest


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
