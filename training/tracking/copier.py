"""Copies the lines of a run's metrics files to its MLflow run, however often MLflow fails.

By the driver, which reads what a worker writes: workers need no way to MLflow, nor the seconds of
importing it. Knows nothing of training or of how a run was made. The file is the buffer: nothing is
held in memory, and what MLflow lacks is found by asking it.
Invariant: a (metric, step) is one point in MLflow, and no failure of MLflow reaches the caller.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

from pipeline.storage import Location, is_storage_failure
from training.attempt import UNHELD, Attempt
from training.errors import RunTaken
from training.tracking.client import RunHandle, legal_name, mlflow_client, one_line
from training.tracking.spool import PUBLISH_S
from training.tracking.tracker import parse_line

log = logging.getLogger(__name__)

LOOK_S = 1.0
_MAX_METRICS = 1000  # MLflow's limit on one log_batch
_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_FINAL_ERRORS = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"}
_END_S = 30.0


@contextlib.contextmanager
def copied(
    handle: RunHandle, place: Location, name: str, attempt: Attempt = UNHELD
) -> Iterator[None]:
    """Copy a file of the run folder to the run while the block goes on; `drain` sends the rest.

    Args: handle: without an id nothing is copied. attempt: once it has lost the run folder nothing
        is sent.
    """
    if not handle.run_id:
        yield
        return
    copier, ending = MetricsCopier(handle, place, name, attempt), threading.Event()
    thread = threading.Thread(
        target=copier.follow, args=(ending,), name="mlflow-copier", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(_END_S)


class MetricsCopier:
    """Copies lines of a metrics file to an MLflow run, from wherever MLflow stands."""

    def __init__(
        self, handle: RunHandle, place: Location, name: str, attempt: Attempt = UNHELD
    ) -> None:
        self._handle, self._place, self._name, self._attempt = handle, place, name, attempt
        self._offset, self._last_line = 0, b""
        self._n_left = 0
        self._last_step_of: dict[str, int] | None = None
        self._n_failures, self._gave_up = 0, False
        self._away = ""
        """What did not answer the last time."""

    def follow(self, ending: threading.Event) -> None:
        """Copy what comes, until `ending` or an error that waiting does not mend."""
        every_s = LOOK_S if self._place.appends else PUBLISH_S
        while not self._gave_up:
            is_well = self._try()
            wait_s = every_s if is_well else _BACKOFF_S[min(self._n_failures, len(_BACKOFF_S)) - 1]
            if ending.wait(wait_s):
                return

    def drain(self, timeout_s: float) -> bool:
        """Copy until all lines are sent or the time is over; True if MLflow has them all."""
        deadline = time.monotonic() + timeout_s
        while not self._try() and not self._gave_up:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            time.sleep(min(1.0, left_s))
        is_complete = not self._n_failures and not self._n_left
        if not is_complete:
            log.warning(
                "MLflow at %s may lack the end of %s; the file is complete",
                self._handle.shown, self._place.uri_of(self._name),
            )  # fmt: skip
        return is_complete

    def _try(self) -> bool:
        """Copy what there is. Returns: whether it went well; if not, it is said once."""
        try:
            self._copy(self._new_lines())
        except Exception as error:
            self._n_failures += 1
            if isinstance(error, RunTaken):  # Who holds the folder now sends its lines.
                self._gave_up = True
                return False
            where = self._place.uri_of(self._name)
            # What MLflow's client raises is its own, whatever the network said to it.
            asked = where if is_storage_failure(error) else f"MLflow at {self._handle.shown}"
            self._gave_up = getattr(error, "error_code", None) in _FINAL_ERRORS
            if self._gave_up or not self._away:
                then = "metrics go to" if self._gave_up else "training goes on, points are kept in"
                log.warning("%s: %s; %s %s", asked, one_line(error), then, where)
            self._away = asked
            return False
        if self._away:
            log.warning("%s answers again; nothing was lost", self._away)
        self._n_failures, self._away = 0, ""
        return True

    def _copy(self, lines: bytes) -> None:
        self._n_left = len(lines)
        client = mlflow_client(self._handle.uri)
        if self._last_step_of is None:
            self._last_step_of = self._attach(client)
        for batch, sent in self._batches(lines):
            self._attempt.check()
            if batch:
                client.log_batch(self._handle.run_id, metrics=batch)
                self._last_step_of.update((point.key, point.step) for point in batch)
            self._offset += len(sent)
            self._n_left -= len(sent)
            self._last_line = sent.splitlines(keepends=True)[-1]

    def _new_lines(self) -> bytes:
        """What stands behind the last line that was copied.

        A worker that goes on from a checkpoint cuts the file: where that line no longer stands in
        its place, the file is read from its beginning, and the points MLflow has are left out.
        """
        try:
            known = self._last_line
            found = self._place.read_from(self._name, self._offset - len(known))
            if found.startswith(known):
                return found[len(known) :]
            self._offset, self._last_line = 0, b""
            return self._place.read_from(self._name, 0)
        except FileNotFoundError:  # No metric was logged yet.
            return b""

    def _attach(self, client: Any) -> dict[str, int]:
        """The last step MLflow holds of each metric; marks the run as going on, and whose.

        Lines are sent in their order, so it has the steps before that too. One request, where the
        histories are one for each metric, and of a long run many pages of each.
        """
        run_id = self._handle.run_id
        self._attempt.check()
        run = client.get_run(run_id)
        for key, value in self._attempt.tags.items():
            client.set_tag(run_id, key, value)
        if self._attempt.number:  # Else it is the copy of a run that goes on no more.
            client.update_run(run_id, status="RUNNING")
        return {metric.key: metric.step for metric in run.data.to_proto().metrics}

    def _batches(self, lines: bytes) -> Iterator[tuple[list[Any], bytes]]:
        """At most 1000 points, with the whole lines that they stand in."""
        batch: list[Any] = []
        begin = end = 0
        for line in lines.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            points = self._missing(parse_line(line) or {})
            if batch and len(batch) + len(points) > _MAX_METRICS:
                yield batch, lines[begin:end]
                batch, begin = [], end
            batch += points
            end += len(line)
        if end > begin:
            yield batch, lines[begin:end]

    def _missing(self, line: dict[str, Any]) -> list[Any]:
        """The points of a line that MLflow lacks."""
        from mlflow.entities import Metric

        if not line:
            return []
        last_step_of = self._last_step_of or {}
        step, time_ms = int(line["step"]), int(line["time"] * 1000)
        return [
            Metric(legal_name(key), math.nan if value is None else value, time_ms, step)
            for key, value in line.items()
            if key not in ("step", "time") and step > last_step_of.get(legal_name(key), -1)
        ]
