"""Sender: a training worker's thread that takes its rows to the banks, so that no step waits.

Knows Ray only as handles of bank actors. Invariant: until a row is on storage (`sync`) the sender
keeps it, and sends it again if the bank actor that took it has died.

A row is in one place at a time: in the outbox of all banks; then on the route of its bank, where it
is waiting, sent (on its way), taken (in the bank's memory) or being written; once it is on storage
it is forgotten here. Rows are dropped only from outbox and waiting.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import ray

from clustering.config import PoolConfig
from clustering.errors import ClusteringError, RoundTimeout
from clustering.kmeans.hashing import vshard_of
from clustering.rounds.bank import BankRows

_OUTSTANDING = 2
"""Loads on their way to one bank: one travels while the other is taken."""
_IDLE_S = 0.05
_SYNC_LOADS = 4
"""Loads a bank takes before it writes them down: little is left to write when a round starts."""


class Sent(NamedTuple):
    """A `push` in progress."""

    reply: Any
    """Will be the incarnation of the bank that took the rows."""
    rows: BankRows


class Taken(NamedTuple):
    """Rows in the memory of a bank, which are lost if it dies."""

    incarnation: str
    rows: BankRows


class Writing(NamedTuple):
    """A `sync` in progress."""

    reply: Any
    """Will be the incarnation whose rows are then on storage."""
    loads: list[Taken]


@dataclass
class BankRoute:
    """The rows between this worker and one bank actor."""

    bank: Any
    waiting: deque[BankRows] = field(default_factory=deque)
    sent: list[Sent] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)
    writing: Writing | None = None

    @property
    def n_unwritten(self) -> int:
        """Rows that the bank has taken but that are not on storage."""
        loads = self.taken + (self.writing.loads if self.writing else [])
        return sum(len(load.rows.keys) for load in loads)

    @property
    def busy(self) -> bool:
        """Whether there is something to send or a reply to wait for."""
        return bool(self.waiting or self.sent or self.writing)


class Sender:
    """A thread that coalesces, routes, sends and acknowledges rows."""

    def __init__(self, banks: list[Any], vshards: int, config: PoolConfig) -> None:
        self._routes = [BankRoute(bank) for bank in banks]
        self._vshards = vshards
        self._config = config
        self._outbox: deque[BankRows] = deque()
        self._since = time.monotonic()
        self._n_waiting = 0
        """Rows in the outbox and waiting on routes: what `buffer_rows` bounds."""
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
            self._n_waiting += len(rows.keys)
            self._drop_oldest()
            if first or self._n_waiting >= self._config.coalesce_rows:
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
                unwritten = sum(route.n_unwritten for route in self._routes)
                raise RoundTimeout(
                    f"{self._n_waiting} rows wait and {unwritten} are not yet on storage after "
                    f"{timeout_s:g} s. Are the bank actors alive and the folder of the rounds "
                    "writable?"
                )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise ClusteringError(
                f"rows cannot be sent to the feature bank: {self._failure}"
            ) from self._failure

    def _drop_oldest(self) -> None:
        while self._n_waiting > self._config.buffer_rows:
            longest = max(self._routes, key=lambda route: len(route.waiting))
            queue = longest.waiting or self._outbox
            if not queue:
                return  # all that waits is being routed at this moment
            n = len(queue.popleft().keys)
            self._n_waiting -= n
            self.dropped += n

    def _run(self) -> None:
        try:
            while True:
                self._wait_for_work()
                self._route()
                for route in self._routes:
                    self._send(route)
                    self._acknowledge(route)
                    self._collect_written(route)
                    self._ask_to_write(route)
                self._end_flush()
        except BaseException as error:  # handed to the training thread, which raises it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _wait_for_work(self) -> None:
        with self._changed:
            if not any(route.busy for route in self._routes):
                self._changed.wait_for(self._due, _IDLE_S if self._outbox else None)
                return
            replies = [sent.reply for route in self._routes for sent in route.sent]
            replies += [route.writing.reply for route in self._routes if route.writing]
        if replies:
            ray.wait(replies, num_returns=1, timeout=_IDLE_S, fetch_local=False)

    def _due(self) -> bool:
        """Whether the outbox is to be sent: small loads would cost the bank a call each."""
        if self._flushing:
            return True
        old = time.monotonic() - self._since > self._config.coalesce_s
        return bool(self._outbox) and (self._n_waiting >= self._config.coalesce_rows or old)

    def _route(self) -> None:
        """Move the outbox to the routes, split by owner."""
        with self._changed:
            if not self._outbox or not self._due():
                return
            due = list(self._outbox)
            self._outbox.clear()
        # Without the lock: a push must not wait for this copy.
        rows = BankRows.concat(due)
        owner = vshard_of(rows.keys, self._vshards) % len(self._routes)
        parts = [rows.take(np.flatnonzero(owner == i)) for i in range(len(self._routes))]
        with self._changed:
            for route, part in zip(self._routes, parts, strict=True):
                if len(part.keys):
                    route.waiting.append(part)

    def _send(self, route: BankRoute) -> None:
        while len(route.sent) < _OUTSTANDING:
            with self._changed:
                if not route.waiting:
                    return
                rows = route.waiting.popleft()
                self._n_waiting -= len(rows.keys)
            route.sent.append(Sent(route.bank.push.remote(*rows), rows))

    def _acknowledge(self, route: BankRoute) -> None:
        while route.sent and _replied(route.sent[0].reply):
            reply, rows = route.sent.pop(0)
            route.taken.append(Taken(ray.get(reply), rows))

    def _collect_written(self, route: BankRoute) -> None:
        """Forget what is on storage; rows of an incarnation that died before are sent again."""
        if route.writing is None or not _replied(route.writing.reply):
            return
        incarnation = ray.get(route.writing.reply)
        lost = [load.rows for load in route.writing.loads if load.incarnation != incarnation]
        route.writing = None
        with self._changed:
            for rows in lost:
                route.waiting.append(rows)
                self._n_waiting += len(rows.keys)

    def _ask_to_write(self, route: BankRoute) -> None:
        if not route.taken or route.writing is not None:
            return
        drained = not route.waiting and not route.sent
        many = route.n_unwritten >= _SYNC_LOADS * self._config.coalesce_rows
        if many or (self._flushing and drained):
            route.writing = Writing(route.bank.sync.remote(), route.taken)
            route.taken = []

    def _end_flush(self) -> None:
        with self._changed:
            left = self._outbox or any(route.busy or route.taken for route in self._routes)
            if self._flushing and not left:
                self._flushing = False
                self._changed.notify_all()


def _replied(reply: Any) -> bool:
    return bool(ray.wait([reply], timeout=0)[0])
