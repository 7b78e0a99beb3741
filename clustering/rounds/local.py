"""LocalRounds: `Rounds` in one process, the same bits as the actor pool, without Ray.

For tests and for training in one process. Invariant: everything a round depends on goes through the
same bank, frozen rows, passes and maker as in clustering.pool.pool.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from clustering import storage
from clustering.config import KMeansConfig, PoolConfig
from clustering.errors import RoundTimeout
from clustering.kmeans.passes import LocalPasses
from clustering.kmeans.share import Share
from clustering.rounds.bank import Bank, check_push, stats_of
from clustering.rounds.files import forget_vectors, is_complete, load_round, vectors_uri
from clustering.rounds.frozen import FrozenRows, write_rows
from clustering.rounds.given import Given
from clustering.rounds.maker import RoundMaker
from clustering.rounds.protocol import BankStats, PublishedRound, RoundRequest
from clustering.rounds.saved import (
    SavedBank,
    forget_later,
    forget_saved,
    home_of,
    name_in,
    read_saved,
    saved_rows,
    write_saved,
)


class LocalRounds:
    """Implements `Rounds`; rounds are written under `uri`."""

    def __init__(
        self,
        config: KMeansConfig,
        streams: Mapping[str, int],
        uri: str,
        seed: int = 0,
        *,
        given: Given | None = None,
        keep_vectors: int | None = None,
    ) -> None:
        """Args: streams: name and width P of each slice of a bank row, in their order.

        given: labels to publish instead of a clustering, or to cluster the other clips from.
        keep_vectors: as in `PoolConfig`.
        """
        self._config = config
        self._streams = dict(streams)
        self._uri = uri
        self._keep_vectors = keep_vectors or PoolConfig().keep_vectors
        self._bank = Bank(sum(streams.values()))
        self._lock = threading.Lock()
        self._maker = RoundMaker(config, streams, uri, seed, given)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="clustering")
        self._running: dict[int, Future[PublishedRound]] = {}

    def push(self, keys_B: np.ndarray, features_BW: np.ndarray, step: int) -> None:
        """See `Rounds.push`; nothing is ever dropped."""
        keys, rows = check_push(keys_B, features_BW, self._streams)
        with self._lock:
            self._bank.push(keys, np.full(len(keys), step, dtype=np.int64), rows)

    def flush(self, timeout_s: float) -> None:
        """See `Rounds.flush`; pushed rows are there at once."""

    def start(self, request: RoundRequest) -> None:
        """See `Rounds.start`; the bank is frozen later, as a pool's is."""
        self._maker.begin(request)
        for old in [r for r, made in self._running.items() if r < request.round and made.done()]:
            del self._running[old]
        if self._maker.frozen(request.round) is None:
            with self._lock:
                self._bank.hold(request.step)
        self._running[request.round] = self._worker.submit(self._make, request)

    def wait(self, round: int, timeout_s: float) -> PublishedRound:
        """See `Rounds.wait`."""
        if round not in self._running:
            self._resume(round)
        try:
            return self._running[round].result(timeout_s)
        except TimeoutError:
            raise RoundTimeout(
                f"round {round} is not ready after {timeout_s:g} s. Raise rounds.timeout_s, or "
                "make rounds cheaper: fewer iterations, clustering.max_points_per_centroid."
            ) from None

    def save(self, uri: str) -> None:
        """See `Rounds.save`; whole, in one file."""
        with self._lock:
            rows, held = self._bank.kept()
        file = storage.join(uri, "rows.parquet")
        write_rows(file, rows, self._streams, self._config.vshards)
        write_saved(uri, SavedBank((name_in(home_of(uri), file),), held))

    def forget_saved(self, keep: int) -> None:
        """See `Rounds.forget_saved`."""
        forget_saved(self._uri, keep)

    def forget_later(self, step: int) -> None:
        """See `Rounds.forget_later`."""
        forget_later(self._uri, step)

    def restore(self, uri: str) -> None:
        """See `Rounds.restore`."""
        rows = saved_rows(uri, self._streams)
        with self._lock:
            self._bank.clear(read_saved(uri).held)
            self._bank.push(*rows)

    @property
    def dropped(self) -> int:
        """See `Rounds.dropped`."""
        return 0

    def stats(self) -> BankStats:
        """See `Rounds.stats`."""
        with self._lock:
            return stats_of([self._bank.ages()])

    def close(self) -> None:
        """Stop after the round in progress."""
        self._worker.shutdown(wait=True)

    def _resume(self, round: int) -> None:
        """A round of an earlier process: finished, or frozen and not yet finished."""
        request = self._maker.resumable(round)
        if request is not None:
            self._running[round] = self._worker.submit(self._make, request)
            return
        done: Future[PublishedRound] = Future()
        done.set_result(load_round(self._uri, round))
        self._running[round] = done

    def _make(self, request: RoundRequest) -> PublishedRound:
        if is_complete(self._uri, request.round):
            self._release(request.step)
            return load_round(self._uri, request.round)
        frozen = self._maker.frozen(request.round) or self._freeze(request)
        self._release(request.step)
        share = Share(frozen.source(), self._config.block_rows, self._config.device)
        published = self._maker.make(LocalPasses(share), frozen, request)
        forget_vectors(self._uri, request.round, self._keep_vectors)
        return published

    def _freeze(self, request: RoundRequest) -> FrozenRows:
        with self._lock:
            rows = self._bank.freeze(request.step)
        folder = vectors_uri(self._uri, request.round)
        part_uri = storage.join(folder, "part-0000.parquet")
        part = write_rows(part_uri, rows, self._streams, self._config.vshards)
        return FrozenRows.commit(folder, (part,), sum(self._streams.values()))

    def _release(self, step: int) -> None:
        """See `Bank.release`; a bank that was restored may wait for a freeze that has been."""
        with self._lock:
            self._bank.release(step)
