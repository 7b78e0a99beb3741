"""watched_nodes: a NodeWatch on every node of the cluster this job has joined, also on late ones.

The edge to Ray. Invariant: a run never waits for its watches but at its end, and then not for long;
without a cluster that was joined there is nothing that would outlive this process.
"""

import atexit
import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

from diccae.nodes.kept_logs import DRIVER, KeptLogs
from diccae.nodes.log_files import LogFile, own_log
from diccae.nodes.watch import EVERY_S, Keeper, NodeWatch, Watched, masks
from diccae.resources import embedded_cores, job_id
from training.attempt import Attempt
from training.tracking.client import RunHandle
from training.tracking.system_metrics import SystemMetrics

log = logging.getLogger(__name__)

_LOOK_S = 5.0
_END_S = 30.0
_HERE = "this-machine"


@contextlib.contextmanager
def watched_nodes(
    attempt: Attempt, handle: RunHandle, measure: bool, every_s: float = EVERY_S
) -> Iterator[None]:
    """Watch while a stage runs. Args: measure: send what nodes use to the MLflow run."""
    measured = handle if measure and handle.run_id else None
    if embedded_cores() is not None:
        with _measured_here(measured):
            yield
        return
    import ray

    job = ray.get_runtime_context().get_job_id()
    nodes = _Nodes(Watched(attempt, job, measured, every_s))
    try:
        with _driver_log_kept(attempt, every_s):
            yield
    finally:
        nodes.close()


@contextlib.contextmanager
def _measured_here(handle: RunHandle | None) -> Iterator[None]:
    """This machine is the cluster: its output is on the screen, and no node but it is measured."""
    if handle is None:
        yield
        return
    measures, stop = SystemMetrics(handle, _HERE), threading.Event()

    def keep_on() -> None:
        measures.keep_on()
        while not stop.wait(EVERY_S):
            measures.keep_on()

    threading.Thread(target=keep_on, name="node-metrics", daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        measures.close()


@contextlib.contextmanager
def _driver_log_kept(attempt: Attempt, every_s: float) -> Iterator[None]:
    """Keep what this process says, if it is the driver of a job, whose output goes to a file.

    Once more when the process ends: the error that ended it is said last.
    """
    path = own_log() if job_id() else None
    if path is None or not attempt.number:
        yield
        return
    file = LogFile(DRIVER, path)
    keeper = Keeper(KeptLogs(attempt, "driver", masks()), lambda: [file], None, every_s)
    atexit.register(keeper.publish)
    try:
        yield
    finally:
        keeper.close()


class _Nodes:
    """Starts a watch on each node that is there or comes."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._watches: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watched-nodes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until all have written what they have; those that do not answer are left."""
        self._stop.set()
        self._thread.join(_END_S)
        try:
            self._end(list(self._watches.values()))
        except Exception as error:  # It must not stand in the way of what ended the stage.
            log.warning("logs may lack their end: %s: %s", type(error).__name__, error)

    @staticmethod
    def _end(watches: list[Any]) -> None:
        import ray

        if not watches:
            return
        ray.wait(
            [watch.finish.remote() for watch in watches], num_returns=len(watches), timeout=_END_S
        )
        for watch in watches:
            ray.kill(watch)

    def _run(self) -> None:
        while True:
            try:
                self._look()
            except Exception as error:  # The run does not depend on being watched.
                log.warning("nodes are not watched: %s: %s", type(error).__name__, error)
                return
            if self._stop.wait(_LOOK_S):
                return

    def _look(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in ray.nodes():
            node_id = node["NodeID"]
            if not node["Alive"] or node_id in self._watches:
                continue
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            # No CPU: also the head, which takes no work, is watched. Not retried on another node.
            watch = ray.remote(NodeWatch).options(num_cpus=0, scheduling_strategy=there)
            name = f"{node['NodeManagerAddress']}-{node_id[:6]}"
            self._watches[node_id] = watch.remote(self._watched, name)
