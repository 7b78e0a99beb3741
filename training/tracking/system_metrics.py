"""SystemMetrics: CPU, memory, GPU and network of one node, in the MLflow run of the training.

Knows nothing of Ray or of what runs on the node; MLflow's own monitor measures. Invariant: no call
raises or waits for long because of MLflow; what it misses while MLflow is away is not sent later.
"""

import logging
import threading
from typing import Any

from training.tracking.client import RunHandle, mlflow_client, one_line

log = logging.getLogger(__name__)

_END_S = 10.0


class SystemMetrics:
    """One monitor after the other: MLflow's ends for good at the first answer that does not come.

    Args: node: stands in the names, `system/<node>/cpu_utilization_percentage`.
        every_s: between two points.
    """

    def __init__(self, handle: RunHandle, node: str, every_s: float = 10.0) -> None:
        self._handle, self._node, self._every_s = handle, node, every_s
        self._monitor: Any = None
        self._ended = threading.Event()
        self._warned = False

    def keep_on(self) -> None:
        """Measure from now on, if MLflow answers and the run is going on; call it now and then."""
        if self._is_measuring():
            return
        try:
            self._begin()
        except Exception as error:
            if not self._warned:
                log.warning(
                    "MLflow at %s gets no metrics of node %s for now: %s",
                    self._handle.shown, self._node, one_line(error),
                )  # fmt: skip
            self._warned = True

    def close(self) -> None:
        """Send what was measured; given up after ten seconds."""
        if not self._is_measuring():
            return
        ending = threading.Thread(target=self._monitor.finish, name="node-metrics", daemon=True)
        ending.start()
        ending.join(_END_S)

    def _is_measuring(self) -> bool:
        return self._monitor is not None and not self._ended.is_set()

    def _begin(self) -> None:
        # MLflow's monitor would end at once, and say so each time.
        client = mlflow_client(self._handle.uri)
        if client.get_run(self._handle.run_id).info.status != "RUNNING":
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        ended = threading.Event()

        class Monitor(SystemMetricsMonitor):  # type: ignore[misc]
            """Says when it has ended, for which MLflow has no public word."""

            def monitor(self) -> None:
                """What MLflow's `start` runs in a thread."""
                try:
                    super().monitor()
                finally:
                    ended.set()

        monitor = Monitor(
            self._handle.run_id,
            sampling_interval=self._every_s,
            # Steps count points: an earlier attempt's, or those of before an outage, go on.
            resume_logging=True,
            node_id=self._node,
            tracking_uri=self._handle.uri,
        )
        monitor.start()
        self._monitor, self._ended = monitor, ended
        self._warned = False
