"""Copies the lines of a `metrics.jsonl` to an MLflow run, in a thread, however often MLflow fails.

Knows nothing of training or of how a run was made. The file is the buffer: nothing is held in
memory, and what MLflow lacks is found by asking it.
Invariant: a (metric, step) is one point in MLflow, and no failure of MLflow reaches the caller.
"""

import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.passwords import without_passwords
from training.attempt import UNHELD, Attempt
from training.errors import RunTaken

log = logging.getLogger(__name__)

_MAX_METRICS = 1000  # MLflow's limit on one log_batch
_COALESCE_S = 1.0
_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_FINAL_ERRORS = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"}


class RunHandle(NamedTuple):
    """All a process needs to write to a run; plain strings, so that it travels anywhere.

    `run_id` is empty if MLflow did not answer when the run was to be created: `catch_up` and
    `finish` create it from what `create_run` left in `out`.
    """

    uri: str
    run_id: str
    out: str = ""

    @property
    def shown(self) -> str:
        """The URI as it is told: in logs, messages and files that are passed on."""
        return without_passwords(self.uri)


def one_line(error: BaseException) -> str:
    """The first line of what an error began with: MLflow wraps a refused connection five deep.

    An interrupt that was being handled when it happened is not its beginning.
    """
    while isinstance(deeper := error.__cause__ or error.__context__, Exception):
        error = deeper
    text = without_passwords(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def mlflow_client(uri: str) -> Any:
    """An MlflowClient; the import takes 2 to 5 s, so it waits until somebody logs."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # The client's own default is 7 retries, minutes of silence and a warning each; this module
    # retries by itself.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # A server's client prints links on stdout, where `--json` answers.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; what a kill or a full disk cut off is left out."""
    with open(path, "rb") as file:
        for line in file:
            if (parsed := parse_line(line)) is not None:
                yield parsed


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, or None if it is not whole."""
    try:
        parsed = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and "step" in parsed and "time" in parsed else None


def legal_name(key: str) -> str:
    """A metric's name as MLflow takes it: `@` is `_at_`, what else it refuses is `_`."""
    return re.sub(r"[^\w\-. :/]", "_", key.replace("@", "_at_"))


class MetricsCopier:
    """Copies lines of a metrics file to an MLflow run, from wherever MLflow stands."""

    def __init__(
        self, handle: RunHandle, path: Path, resume_step: int = 0, attempt: Attempt = UNHELD
    ) -> None:
        self._attempt = attempt
        self._handle, self._path, self._resume_step = handle, path, resume_step
        self._offset = 0
        self._last_step_of: dict[str, int] | None = None
        self._warned = self._gave_up = False
        self._wake, self._closing = threading.Event(), threading.Event()
        self._deadline = math.inf
        self._thread = threading.Thread(target=self._run, name="mlflow-copier", daemon=True)

    def start(self) -> None:
        """Copy in the background from now on."""
        self._thread.start()

    def wake(self) -> None:
        """Say that a line was written."""
        self._wake.set()

    def stop(self, timeout_s: float) -> bool:
        """End the thread once all lines are sent or the time is over."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s + 1.0)
        return self._complete()

    def drain(self, timeout_s: float) -> bool:
        """Copy in this thread until all lines are sent or the time is over."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._run()
        return self._complete()

    def _complete(self) -> bool:
        missing = self._path.stat().st_size - self._offset
        if missing:
            log.warning(
                "MLflow at %s lacks the last %d bytes of %s; the file is complete",
                self._handle.shown, missing, self._path,
            )  # fmt: skip
        return missing == 0

    def _run(self) -> None:
        failures = 0
        while not self._gave_up:
            # Asked before copying: a line written before the end may be missed by a copy before it.
            ending = self._closing.is_set()
            self._wake.clear()
            try:
                self._copy()
                if self._warned:
                    log.warning("MLflow at %s answers again; nothing was lost", self._handle.shown)
                failures, self._warned = 0, False
            except RunTaken:
                return  # The attempt that holds the folder now sends its lines.
            except Exception as error:
                self._report(error)
                failures += 1
            if ending and (failures == 0 or time.monotonic() > self._deadline):
                return
            self._pause(failures)

    def _pause(self, failures: int) -> None:
        if failures:
            wait_s = _BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1]
            if self._closing.is_set():
                time.sleep(max(0.0, min(wait_s, 1.0, self._deadline - time.monotonic())))
            else:
                self._closing.wait(wait_s)
        elif not self._closing.is_set():
            self._wake.wait()
            self._closing.wait(_COALESCE_S)

    def _report(self, error: Exception) -> None:
        final = getattr(error, "error_code", None) in _FINAL_ERRORS
        self._gave_up = final
        if final or not self._warned:
            self._warned = True
            then = "metrics go to" if final else "training goes on, points are kept in"
            log.warning(
                "MLflow at %s: %s; %s %s", self._handle.shown, one_line(error), then, self._path
            )

    def _copy(self) -> None:
        client = mlflow_client(self._handle.uri)
        if self._last_step_of is None:
            self._last_step_of = self._attach(client)
        for batch, end in self._batches():
            self._attempt.check()
            if batch:
                client.log_batch(self._handle.run_id, metrics=batch)
            self._offset = end

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
        if run.info.status != "FINISHED":  # Else the driver may have ended it by now.
            if self._resume_step:
                client.set_tag(run_id, "resumed_from_step", str(self._resume_step))
            if self._resume_step or self._attempt.number:  # Neither: a report's copy.
                client.update_run(run_id, status="RUNNING")
        return {metric.key: metric.step for metric in run.data.to_proto().metrics}

    def _batches(self) -> Iterator[tuple[list[Any], int]]:
        """Whole lines not yet sent, as at most 1000 points, with the offset behind them."""
        batch: list[Any] = []
        end = self._offset
        with open(self._path, "rb") as file:
            file.seek(end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                points = self._missing(parse_line(line) or {})
                if batch and len(batch) + len(points) > _MAX_METRICS:
                    yield batch, end
                    batch = []
                batch += points
                end += len(line)
        yield batch, end

    def _missing(self, line: dict[str, Any]) -> list[Any]:
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
