"""PoolClient: `Rounds` for a training worker, over the handles of a pool's actors.

Knows nothing of how rounds are made. Invariant: rows wait only in the process that pushed
them; a pickled client starts without any.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from clustering.config import PoolConfig
from clustering.errors import RoundTimeout
from clustering.pool.compute import unwrapped
from clustering.pool.sender import Sender
from clustering.rounds.bank import BankRows, check_push, stats_of
from clustering.rounds.protocol import BankStats, PublishedRound, RoundRequest


class PoolClient:
    """Implements `Rounds` against a pool; pickles as handles, so each worker buffers for itself."""

    def __init__(
        self,
        vshards: int,
        config: PoolConfig,
        streams: Mapping[str, int],
        banks: list[Any],
        coordinator: Any,
    ) -> None:
        self._vshards, self._config, self._streams = vshards, config, dict(streams)
        self._banks, self._coordinator = banks, coordinator
        self._sender: Sender | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the rows that wait in this process."""
        handles = (self._banks, self._coordinator)
        return PoolClient, (self._vshards, self._config, self._streams, *handles)

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
                    "make rounds cheaper: more pool.n_actors, fewer iterations, "
                    "clustering.max_points_per_centroid."
                )
            try:
                published: PublishedRound = ray.get(found[0])
                return published
            except ObjectLostError:
                # The coordinator died after it had answered; its successor reads from storage.
                continue

    def save(self, uri: str) -> None:
        """See `Rounds.save`."""
        unwrapped(lambda: ray.get(self._coordinator.save.remote(uri)))

    def forget_saved(self, keep: int) -> None:
        """See `Rounds.forget_saved`."""
        unwrapped(lambda: ray.get(self._coordinator.forget_saved.remote(keep)))

    def forget_later(self, step: int) -> None:
        """See `Rounds.forget_later`."""
        unwrapped(lambda: ray.get(self._coordinator.forget_later.remote(step)))

    def restore(self, uri: str) -> None:
        """See `Rounds.restore`."""
        unwrapped(lambda: ray.get([bank.restore.remote(uri) for bank in self._banks]))

    @property
    def dropped(self) -> int:
        """See `Rounds.dropped`."""
        return self._sender.dropped if self._sender else 0

    def stats(self) -> BankStats:
        """See `Rounds.stats`."""
        return stats_of(ray.get([bank.ages.remote() for bank in self._banks]))

    def _sending(self) -> Sender:
        if self._sender is None:
            self._sender = Sender(self._banks, self._vshards, self._config)
        return self._sender
