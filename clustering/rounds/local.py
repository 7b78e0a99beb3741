"""Rounds in one process: the same bits as the actor pool, without Ray.

For tests and for training in one process. Invariant: everything a round depends on goes through the
same bank, snapshot, passes and maker as in clustering.pool.pool.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from clustering import storage
from clustering.config import ClusteringConfig
from clustering.errors import RoundTimeout
from clustering.kmeans.passes import LocalPasses, Table
from clustering.kmeans.share import Share
from clustering.rounds.bank import Bank, BankRows, check_push
from clustering.rounds.files import (
    begin,
    forget_vectors,
    is_complete,
    load_round,
    unfinished,
    vectors_uri,
)
from clustering.rounds.maker import RoundMaker, identity
from clustering.rounds.protocol import BankStats, PublishedRound, RoundRequest
from clustering.rounds.snapshot import Snapshot, saved_rows, write_part


class LocalRounds:
    """Implements `Rounds`; rounds are written under `uri`."""

    def __init__(
        self,
        config: ClusteringConfig,
        streams: Mapping[str, int],
        uri: str,
        seed: int = 0,
        given: Table | None = None,
    ) -> None:
        """Args: streams: name and width P of each slice of a bank row, in their order.

        given: keys and labels in 0..K-1 to publish instead of a clustering; clips not among them
            have none.
        """
        self._config = config
        self._streams = dict(streams)
        self._width = sum(streams.values())
        self._uri = uri
        self._identity = identity(config, streams, seed, given)
        self._bank = Bank(self._width)
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
        """See `Rounds.start`; the bank is frozen before this returns."""
        begin(self._uri, request, self._identity)
        for old in [r for r, made in self._running.items() if r < request.round and made.done()]:
            del self._running[old]
        with self._lock:
            rows = self._bank.freeze(request.step)
        self._running[request.round] = self._worker.submit(self._make, request, rows)

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
        """See `Rounds.save`."""
        with self._lock:
            rows = self._bank.everything()
        write_part(
            storage.join(uri, "bank-0000.parquet"), rows, self._streams, self._config.vshards
        )

    def restore(self, uri: str) -> None:
        """See `Rounds.restore`."""
        rows = saved_rows(uri, self._streams)
        with self._lock:
            self._bank.replace(rows)

    def stats(self) -> BankStats:
        """See `Rounds.stats`."""
        with self._lock:
            rows, step_sum, oldest, newest = self._bank.ages()
            n_bytes = self._bank.n_bytes
        age_mean = newest - step_sum / rows if rows else 0.0
        return BankStats(rows, 0, age_mean, newest - oldest, n_bytes)

    def close(self) -> None:
        """Stop after the round in progress."""
        self._worker.shutdown(wait=True)

    def _resume(self, round: int) -> None:
        """A round of an earlier process: finished, or frozen and not yet finished."""
        for request in unfinished(self._uri, self._identity):
            if request.round == round and self._snapshot(request) is not None:
                self._running[round] = self._worker.submit(self._make, request, None)
                return
        done: Future[PublishedRound] = Future()
        done.set_result(load_round(self._uri, round))
        self._running[round] = done

    def _make(self, request: RoundRequest, rows: BankRows | None) -> PublishedRound:
        if is_complete(self._uri, request.round):
            return load_round(self._uri, request.round)
        snapshot = self._snapshot(request)
        if snapshot is None:
            assert rows is not None
            snapshot = self._write(request, rows)
        share = Share(snapshot.source(), self._config.block_rows, self._config.device)
        published = self._maker.make(LocalPasses(share), snapshot, request)
        forget_vectors(self._uri, request.round, self._config.keep_vectors)
        return published

    def _snapshot(self, request: RoundRequest) -> Snapshot | None:
        return Snapshot.load(vectors_uri(self._uri, request.round))

    def _write(self, request: RoundRequest, rows: BankRows) -> Snapshot:
        folder = vectors_uri(self._uri, request.round)
        part_uri = storage.join(folder, "part-0000.parquet")
        part = write_part(part_uri, rows, self._streams, self._config.vshards)
        snapshot = Snapshot(folder, (part,), self._width)
        snapshot.write_manifest()
        return snapshot
