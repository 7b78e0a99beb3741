"""NodeWatch: keeps the logs of a run's processes on one node, and measures the node.

Runs as a Ray actor that asks for no CPU, one a node; imports no Ray. Invariant: whatever happens to
storage or to MLflow, the run goes on; a node that dies takes the last ten seconds with it.
"""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from diccae.nodes.kept_logs import KeptLogs
from diccae.nodes.log_files import LogFile, Masks, files_of
from pipeline.storage import is_storage_failure
from training.attempt import Attempt
from training.errors import RunTaken
from training.tracking.client import RunHandle
from training.tracking.system_metrics import SystemMetrics

log = logging.getLogger(__name__)

EVERY_S = 10.0


class Watched(NamedTuple):
    """What is watched for, the same on all nodes."""

    attempt: Attempt
    job: str
    """As Ray numbers it."""
    handle: RunHandle | None
    """MLflow run that gets what the nodes use; None: nothing is measured."""
    every_s: float = EVERY_S


class NodeWatch:
    """Works in a thread until `finish`."""

    def __init__(self, watched: Watched, node: str) -> None:
        """In an actor: Ray's logs of the node lie where this process's own goes to."""
        folder = Path(os.readlink("/proc/self/fd/1")).parent
        measures = SystemMetrics(watched.handle, node) if watched.handle is not None else None
        logs = KeptLogs(watched.attempt, node, masks())
        self._keeper = Keeper(
            logs,
            lambda: files_of(folder, watched.job, but_pid=os.getpid()),
            measures,
            watched.every_s,
        )

    def finish(self) -> None:
        """Keep what was said until now, and end."""
        self._keeper.close()


class Keeper:
    """A thread that writes logs down and keeps the measuring going."""

    def __init__(
        self,
        logs: KeptLogs,
        files: Callable[[], list[LogFile]],
        measures: SystemMetrics | None,
        every_s: float,
    ) -> None:
        self._logs, self._files, self._measures = logs, files, measures
        self._every_s, self._failed, self._lost = every_s, False, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is left."""
        self._stop.set()
        self._thread.join()
        self.publish()
        if self._measures is not None:
            self._measures.close()

    def publish(self) -> None:
        """Write what changed; a failure of storage is a warning, once."""
        if self._lost:
            return
        try:
            files = self._files()
            self._logs.publish(files)
            self._failed = False
        except RunTaken:
            self._lost = True
        except Exception as error:
            if not is_storage_failure(error):
                raise
            if not self._failed:
                log.warning("logs are not kept for now: %s: %s", type(error).__name__, error)
            self._failed = True

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.publish()
            # A node without a process of the run is none of it.
            if self._measures is not None and not self._lost and self._files():
                self._measures.keep_on()


def masks() -> Masks:
    """Secrets that this process knows: of its variables, and the cluster's token."""
    from deploy.config import SECRET_NAMES
    from deploy.connect import find_token

    return Masks.of(os.environ, SECRET_NAMES, find_token()[0])
