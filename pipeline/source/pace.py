"""Pace: says in the log how far a look through many bytes is, where no progress line shows yet.

Knows nothing of what is read. Invariant: a look that is over within seconds says nothing.
"""

import logging
import threading
import time
from datetime import timedelta

_FIRST_S = 10.0
_EVERY_S = 30.0
_log = logging.getLogger(__name__)


class Pace:
    """How far a look is; several threads may tell it at once."""

    def __init__(self, what: str, total: int) -> None:
        """Args: what: is done, in a few words; total: bytes there are to read."""
        self._what, self._total = what, total
        self._done = 0
        self._started = time.monotonic()
        self._next = self._started + _FIRST_S
        self._lock = threading.Lock()

    def read(self, n_bytes: int) -> None:
        """So many bytes more were read."""
        with self._lock:
            self._done += n_bytes
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + _EVERY_S
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate if rate else 0.0
            _log.info(
                "%s: %.1f of %.1f GB, %.0f MB/s, left %s",
                self._what, self._done / 1e9, self._total / 1e9, rate / 1e6,
                timedelta(seconds=int(max(left, 0.0))),
            )  # fmt: skip

    def known(self, n_bytes: int) -> None:
        """So many bytes need not be read after all."""
        with self._lock:
            self._total -= n_bytes
