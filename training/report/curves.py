"""Training metrics as panels of curves, thinned for the eye.

Pure: lines of metrics become columns, columns become curves. Knows nothing of HTML. Invariant:
every metric that was logged has one place, those that never changed in a list of their own, and
thinning keeps the extremes of each stretch.

Shapes: N points of a metric.
"""

import math
from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Clips matched to their own sound", ("accuracy_instance",)),
    (
        "Classes told apart by their neighbours, sample of the training clips",
        ("train_knn/audio", "train_knn/video", "train_knn/fusion"),
    ),
    ("Share of clips with a pseudo-label", ("labelled_frac",)),
    ("Mean off-diagonal confusion", ("confusion/mean_offdiagonal",)),
    ("Learning rate", ("lr",)),
    ("Gradient norm", ("grad_norm",)),
    ("Clips per second", ("clips_per_s",)),
)
"""Title and metrics of what has a place of its own; the terms of the loss come before them."""
_NOT_CURVES = {"step", "time", "epoch"}
_POINTS = 400


class Column(NamedTuple):
    """A metric where it was logged and finite."""

    steps_N: NDArray[np.int64]
    values_N: NDArray[np.float64]

    @property
    def is_still(self) -> bool:
        """Whether it was logged more than once and never changed: a curve would say nothing."""
        return len(self.values_N) > 1 and bool((self.values_N == self.values_N[0]).all())


Columns = dict[str, Column]


def columns_of(lines: Iterable[dict[str, Any]], prefix: str = "") -> Columns:
    """Lines of metrics by name, without `prefix`; 100,000 lines as dicts would take 0.5 GB.

    What is null or not finite is no point.
    """
    steps: dict[str, array[int]] = {}
    values: dict[str, array[float]] = {}
    for line in lines:
        step = int(line["step"])
        for name, value in line.items():
            if name in _NOT_CURVES or value is None or not math.isfinite(value):
                continue
            if name not in steps:
                steps[name], values[name] = array("q"), array("d")
            steps[name].append(step)
            values[name].append(value)
    return {
        name.removeprefix(prefix): Column(
            np.frombuffer(steps[name], np.int64), np.frombuffer(values[name], np.float64)
        )
        for name in steps
    }


class Series(NamedTuple):
    """One curve."""

    name: str
    points: list[tuple[int, float]]
    """(step, value), by step."""


class Panel(NamedTuple):
    """Curves that share axes."""

    title: str
    series: list[Series]


def panels(columns: Columns) -> list[Panel]:
    """The curves of a run: the known panels first, the rest by the prefix of their names.

    The seconds of a step (`time/...`) and the health of rounds (`clustering/...`) have sections of
    their own and are left out, and so is what never changed (`unchanging`).
    """
    series = {
        name: Series(name, thin(column))
        for name, column in columns.items()
        if _is_curve(name) and not column.is_still
    }
    # By name, not from the table of terms: that would load torch, 0.7 GB, to draw a page.
    terms = tuple(name for name in series if name == "loss" or name.startswith("loss_"))
    found = []
    for title, names in (("Loss", terms), *_PANELS):
        known = [series.pop(name) for name in names if name in series]
        if known:
            found.append(Panel(title, known))
    rest: dict[str, list[Series]] = {}
    for name in sorted(series):
        prefix, slash, _ = name.rpartition("/")
        rest.setdefault(prefix if slash else name, []).append(series[name])
    return found + [Panel(_title(name), curves) for name, curves in rest.items()]


def _title(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def unchanging(columns: Columns) -> list[tuple[str, float]]:
    """Metrics that kept one value all the time, with that value."""
    return [
        (name, float(column.values_N[0]))
        for name, column in columns.items()
        if _is_curve(name) and column.is_still
    ]


def _is_curve(name: str) -> bool:
    return not name.startswith(("time/", "clustering/"))


def thin(column: Column, most: int = _POINTS) -> list[tuple[int, float]]:
    """At most about `most` points: of each stretch its lowest and its highest, in order."""
    n = len(column.steps_N)
    kept = np.arange(n)
    if n > most:
        stretch = math.ceil(2 * n / most)
        n_stretches = math.ceil(n / stretch)
        # The last stretch is filled up with its own last point.
        value_SN = np.pad(column.values_N, (0, n_stretches * stretch - n), mode="edge")
        value_SN = value_SN.reshape(n_stretches, stretch)
        begins = np.arange(n_stretches) * stretch
        extremes = [begins + value_SN.argmin(1), begins + value_SN.argmax(1), [0, n - 1]]
        kept = np.unique(np.minimum(np.concatenate(extremes), n - 1))
    return list(zip(column.steps_N[kept].tolist(), column.values_N[kept].tolist(), strict=True))


class TimePart(NamedTuple):
    """A part of a whole, in seconds."""

    name: str
    seconds: float


_STEP_PARTS = (
    "data_wait", "augment", "forward", "loss", "gather", "backward", "update", "push", "stall",
    "checkpoint",
)  # fmt: skip
"""In the order of a step; `backward` holds DDP's exchange, `update` the wait for a GPU."""


def step_seconds(columns: Columns) -> list[TimePart]:
    """Mean seconds of a training step by part, over the lines that have them; [] if none do."""
    if "time/forward" not in columns:
        return []
    n_lines = len(columns["time/forward"].steps_N)
    names = list(_STEP_PARTS)
    names += sorted({n[5:] for n in columns if n.startswith("time/")} - set(names))
    return [
        TimePart(name, float(columns[f"time/{name}"].values_N.sum()) / n_lines)
        for name in names
        if f"time/{name}" in columns
    ]


def phase_seconds(results: dict[str, Any]) -> list[TimePart]:
    """Wall seconds of each phase of the run; clustering runs beside pretraining and is none."""
    return [
        TimePart(name, float(seconds))
        for name, seconds in (results.get("seconds") or {}).items()
        if isinstance(seconds, int | float) and seconds > 0 and name != "cluster"
    ]
