"""Rows on their way to the bank: they leave in the background, the training step never waits.

Knows Ray only as handles of bank actors. Invariant: until a row is on storage (`sync`) the sender
keeps it, and sends it again if the bank actor that took it has died.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from clustering.errors import ClusteringError, RoundTimeout
from clustering.kmeans.hashing import vshard_of
from clustering.rounds.bank import BankRows

_OUTSTANDING = 2
_IDLE_S = 0.05
_SYNC_LOADS = 4
"""Loads a bank takes before it writes them down: little is left to write when a round starts."""


@dataclass
class Lane:
    """Rows on their way to one bank actor."""

    bank: Any
    queue: deque[BankRows] = field(default_factory=deque)
    inflight: list[tuple[Any, BankRows]] = field(default_factory=list)
    kept: list[tuple[str, BankRows]] = field(default_factory=list)
    """Rows an incarnation has taken but not yet written down."""
    syncing: Any = None
    covered: int = 0
    """How many of the kept loads the call in progress will have written down."""

    @property
    def n_kept(self) -> int:
        """Rows that are not yet on storage though sent."""
        return sum(len(rows.keys) for _, rows in self.kept)


class Sender:
    """A thread that coalesces, routes, sends and acknowledges rows."""

    def __init__(
        self,
        banks: list[Any],
        vshards: int,
        coalesce_rows: int,
        coalesce_s: float,
        buffer_rows: int,
    ) -> None:
        self._lanes = [Lane(bank) for bank in banks]
        self._vshards = vshards
        self._coalesce_rows, self._coalesce_s = coalesce_rows, coalesce_s
        self._buffer_rows = buffer_rows
        self._outbox: deque[BankRows] = deque()
        self._since = time.monotonic()
        self._waiting = 0
        self._flushing = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self.dropped = 0
        threading.Thread(target=self._run, name="bank-sender", daemon=True).start()

    def push(self, rows: BankRows) -> None:
        """Take rows over without waiting. Raises: ClusteringError if sending failed for good."""
        with self._changed:
            self._raise_failure()
            first = not self._outbox
            if first:
                self._since = time.monotonic()
            self._outbox.append(rows)
            self._waiting += len(rows.keys)
            self._drop_oldest()
            if first or self._waiting >= self._coalesce_rows:
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> None:
        """Return when every row is on storage. Raises: RoundTimeout, ClusteringError."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            done = self._changed.wait_for(
                lambda: self._failure is not None or not self._flushing, timeout_s
            )
            self._raise_failure()
            if not done:
                self._flushing = False
                raise RoundTimeout(
                    f"{self._waiting} rows wait and {sum(lane.n_kept for lane in self._lanes)} are "
                    f"not yet on storage after {timeout_s:g} s. Are the bank actors alive and the "
                    "snapshot URI writable?"
                )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise ClusteringError(
                f"rows cannot be sent to the feature bank: {self._failure}"
            ) from self._failure

    def _drop_oldest(self) -> None:
        while self._waiting > self._buffer_rows:
            longest = max(self._lanes, key=lambda lane: len(lane.queue))
            queue = longest.queue or self._outbox
            if not queue:
                return  # all that waits is being routed at this moment
            n = len(queue.popleft().keys)
            self._waiting -= n
            self.dropped += n

    def _run(self) -> None:
        try:
            while True:
                self._wait_for_work()
                self._route()
                for lane in self._lanes:
                    self._send(lane)
                    self._acknowledge(lane)
                    self._sync(lane)
                self._end_flush()
        except BaseException as error:  # handed to the training thread, which raises it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _wait_for_work(self) -> None:
        with self._changed:
            if not self._busy():
                self._changed.wait_for(self._due, _IDLE_S if self._outbox else None)
                return
            refs = [ref for lane in self._lanes for ref, _ in lane.inflight]
            refs += [lane.syncing for lane in self._lanes if lane.syncing is not None]
        if refs:
            ray.wait(refs, num_returns=1, timeout=_IDLE_S, fetch_local=False)

    def _busy(self) -> bool:
        return any(lane.inflight or lane.queue or lane.syncing for lane in self._lanes)

    def _due(self) -> bool:
        if self._flushing:
            return True
        old = time.monotonic() - self._since > self._coalesce_s
        return bool(self._outbox) and (self._waiting >= self._coalesce_rows or old)

    def _route(self) -> None:
        """Move the outbox to the lanes, split by owner."""
        with self._changed:
            if not self._outbox or not self._due():
                return
            due = list(self._outbox)
            self._outbox.clear()
        rows = BankRows.concat(due)
        owner = vshard_of(rows.keys, self._vshards) % len(self._lanes)
        parts = [rows.take(np.flatnonzero(owner == i)) for i in range(len(self._lanes))]
        with self._changed:
            for lane, part in zip(self._lanes, parts, strict=True):
                if len(part.keys):
                    lane.queue.append(part)

    def _send(self, lane: Lane) -> None:
        while len(lane.inflight) < _OUTSTANDING:
            with self._changed:
                if not lane.queue:
                    return
                rows = lane.queue.popleft()
                self._waiting -= len(rows.keys)
            lane.inflight.append((lane.bank.push.remote(*rows), rows))

    def _acknowledge(self, lane: Lane) -> None:
        while lane.inflight:
            ready, _ = ray.wait([lane.inflight[0][0]], timeout=0)
            if not ready:
                return
            reference, rows = lane.inflight.pop(0)
            lane.kept.append((ray.get(reference), rows))

    def _sync(self, lane: Lane) -> None:
        if lane.syncing is not None:
            ready, _ = ray.wait([lane.syncing], timeout=0)
            if not ready:
                return
            incarnation = ray.get(lane.syncing)
            lane.syncing = None
            covered, lane.kept = lane.kept[: lane.covered], lane.kept[lane.covered :]
            lost = [rows for holder, rows in covered if holder != incarnation]
            with self._changed:
                for rows in lost:
                    lane.queue.append(rows)
                    self._waiting += len(rows.keys)
            return
        drained = not lane.queue and not lane.inflight
        many = lane.n_kept >= _SYNC_LOADS * self._coalesce_rows
        if lane.kept and ((self._flushing and drained) or many):
            lane.syncing, lane.covered = lane.bank.sync.remote(), len(lane.kept)

    def _end_flush(self) -> None:
        with self._changed:
            left = self._outbox or self._busy() or any(lane.kept for lane in self._lanes)
            if self._flushing and not left:
                self._flushing = False
                self._changed.notify_all()
