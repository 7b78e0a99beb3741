"""Tracker and read_metrics: a run's metrics as lines of a file, written and read.

Knows nothing of what is trained, or of MLflow, which gets copies (copier.py).
Invariant: a (metric, step) is one point, however often the run is killed and resumed, and no call
raises because of a disk.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.attempt import UNHELD, Attempt
from training.tracking.spool import Spool

log = logging.getLogger(__name__)

METRICS, FINETUNE_METRICS = "metrics.jsonl", "finetune.jsonl"
"""Of a run folder: one file a stage that trains."""


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


class Tracker:
    """Writes the metrics of one worker (rank 0).

    Args: metrics_path: a file or its URI. resume_step: the step training goes on from; lines
        beyond it are cut, since those steps come again, and points up to it are never doubled.
        attempt: stands in each line; once it has lost the run folder nothing is written.
        prefix: of every metric's name, `finetune/`: steps of another stage are another curve.
    Raises: RunTaken, also from `log`.
    """

    def __init__(
        self,
        metrics_path: str | Path,
        resume_step: int = 0,
        *,
        attempt: Attempt = UNHELD,
        prefix: str = "",
    ) -> None:
        self._attempt, self._prefix = attempt, prefix
        self._resumed_from: int | None = resume_step or None
        self._spool = Spool(metrics_path, attempt)
        self._path = self._spool.path
        self._last_step_of = _cut(self._path, resume_step)
        self._spool.start()
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._torn = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics of a step, best all in one dict; a metric's step counts once, in order."""
        values = {
            name: float(value)
            for key, value in (metrics | self._of_this_start()).items()
            if step > self._last_step_of.get(name := self._prefix + key, -1)
        }
        if not values:
            return
        self._spool.check()
        self._last_step_of.update(dict.fromkeys(values, step))
        line: dict[str, float | None] = {"step": int(step), "time": round(time.time(), 3)}
        line |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._write(json.dumps(line).encode() + b"\n")
        self._resumed_from = None

    def _of_this_start(self) -> dict[str, float]:
        """Which start logs, and in its first line the step that it went on from."""
        found = {}
        if self._attempt.number:
            found["attempt"] = float(self._attempt.number)
        if self._resumed_from is not None:
            found["resumed_from_step"] = float(self._resumed_from)
        return found

    def _write(self, line: bytes) -> None:
        """One unbuffered write, so that a kill leaves no line of two halves; a full disk may."""
        try:
            whole = self._file.write(b"\n" * self._torn + line) == len(line) + self._torn
            problem = "" if whole else "the disk is full"
        except OSError as error:
            whole, problem = False, str(error)
        if not whole and not self._torn:
            log.warning("%s: %s; training goes on, metrics are lost", self._path, problem)
        self._torn = not whole

    def publish(self) -> None:
        """Lines so far are in the run folder from now on, before a checkpoint counts on them."""
        self._spool.publish()

    def close(self) -> None:
        """Publish what is left."""
        self._file.close()
        self._spool.close()


def _cut(path: Path, resume_step: int) -> dict[str, int]:
    """Keep the lines of steps up to `resume_step` (none at 0); the last step of each metric."""
    lines = list(read_metrics(path)) if path.exists() and resume_step > 0 else []
    kept = [line for line in lines if line["step"] <= resume_step]
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(fresh, path)
    return {key: int(line["step"]) for line in kept for key in line}
