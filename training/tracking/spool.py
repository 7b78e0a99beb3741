"""Spool: where a run's metrics are appended, also where the run folder is no place that appends.

Knows nothing of what a line says. On a disk it is the file itself. An object store can only replace
an object: there lines go to a file of this machine, which is published whole every `PUBLISH_S`, at
each checkpoint and at the end.
Invariant: what is published starts with all that was published before the newest checkpoint; what a
kill takes was logged after it, and is logged again when those steps are trained again.
"""

import logging
import shutil
import tempfile
import threading
import time
from pathlib import Path

from pipeline.scratch import scratch_folder
from pipeline.storage import is_storage_failure, place_of
from training.attempt import UNHELD, Attempt
from training.errors import RunTaken

log = logging.getLogger(__name__)

PUBLISH_S = 10.0
_SHARE = 20
"""A publication takes at most one in so many seconds: the file of a long run grows."""


class Spool:
    """`path` is the file to append to. Args: uri: of the metrics file. Raises: RunTaken."""

    def __init__(self, uri: str | Path, attempt: Attempt = UNHELD) -> None:
        attempt.check()
        self._attempt, self._uri = attempt, str(uri)
        self._place, self._name = place_of(uri)
        self._taken: RunTaken | None = None
        self._is_away = False
        self._published = -1
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._thread: threading.Thread | None = None
        if self._place.appends:
            self.path = Path(self._place.join(self._name))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        self._scratch = scratch_folder()
        self.path = Path(self._scratch.name) / self._name
        if self._place.exists(self._name):
            with self._place.fetched(self._name) as before:
                shutil.copyfile(before, self.path)

    def start(self) -> None:
        """Publish from now on."""
        if self._scratch is not None:
            self.publish()
            self._thread = threading.Thread(target=self._run, name="metrics-spool", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Before each line. Raises: RunTaken; of a spool, once a publication has found it out."""
        if self._scratch is None:
            self._attempt.check()
        elif self._taken is not None:
            raise self._taken

    def publish(self) -> None:
        """All lines to where the run is; storage that fails costs a warning. Raises: RunTaken."""
        if self._scratch is None:
            return
        with self._lock:
            size = self.path.stat().st_size
            if size == self._published:
                return
            try:
                self._attempt.check()
                copy = self.path.with_suffix(".copy")
                shutil.copyfile(self.path, copy)  # Lines come while it is sent.
                self._place.publish(str(copy), self._name)
            except RunTaken as error:
                self._taken = error
                raise
            except Exception as error:
                if not is_storage_failure(error):
                    raise
                if not self._is_away:
                    log.warning("%s: %s; training goes on, metrics wait", self._uri, error)
                self._is_away = True
                return
            self._published, self._is_away = size, False

    def close(self) -> None:
        """Publish what is left; a spool of this machine is gone afterwards. Raises: RunTaken."""
        if self._scratch is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.publish()
            if self._is_away:
                log.warning("%s lacks the last metrics of this run: storage is away", self._uri)
        finally:
            self._scratch.cleanup()

    def _run(self) -> None:
        wait_s = PUBLISH_S
        while not self._stop.wait(wait_s):
            began = time.monotonic()
            try:
                self.publish()
            except RunTaken:
                return  # `check` says so to the trainer.
            wait_s = max(PUBLISH_S, _SHARE * (time.monotonic() - began))
