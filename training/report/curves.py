"""Training metrics as panels of curves, thinned for the eye.

Pure: lists and numbers. Knows nothing of HTML. Invariant: every metric that was logged and can
change has one place, and thinning keeps the extremes of each stretch.
"""

import math
from typing import Any, NamedTuple

from training.losses import objective

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
_TOLD_WHEN_CHANGED = {"world_size", "attempt"}
"""An undisturbed run has one of each all the time: a flat line that says nothing."""
_POINTS = 400


class Series(NamedTuple):
    """One curve."""

    name: str
    points: list[tuple[int, float]]
    """(step, value), by step."""


class Panel(NamedTuple):
    """Curves that share axes."""

    title: str
    series: list[Series]


def panels(metrics: list[dict[str, Any]]) -> list[Panel]:
    """All curves of a run: the known panels first, the rest by the prefix of their names.

    The seconds of a step (`time/...`) and the health of rounds (`clustering/...`) have sections of
    their own and are left out, and so are workers and attempts whose number never changed.
    """
    series = {
        name: Series(name, thin(points))
        for name, points in _points(metrics).items()
        if not name.startswith(("time/", "clustering/"))
    }
    for name in _TOLD_WHEN_CHANGED & series.keys():
        if len({value for _, value in series[name].points}) == 1:
            del series[name]
    terms = ("loss", *(term.metric for term in objective.LOSS_TERMS))
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


def _points(metrics: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name not in _NOT_CURVES and value is not None and math.isfinite(value):
                points.setdefault(name, []).append((int(line["step"]), float(value)))
    return points


def thin(points: list[tuple[int, float]], most: int = _POINTS) -> list[tuple[int, float]]:
    """At most about `most` points: of each stretch its lowest and its highest, in order."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), stretch):
        piece = points[start : start + stretch]
        extremes = {min(piece, key=lambda p: p[1]), max(piece, key=lambda p: p[1])}
        kept += sorted(extremes)
    return sorted({points[0], *kept, points[-1]})


class TimePart(NamedTuple):
    """A part of a whole, in seconds."""

    name: str
    seconds: float


_STEP_PARTS = (
    "data_wait", "augment", "forward", "loss", "gather", "backward", "update", "push", "stall",
    "checkpoint",
)  # fmt: skip
"""In the order of a step; `backward` holds DDP's exchange, `update` the wait for a GPU."""


def step_seconds(metrics: list[dict[str, Any]]) -> list[TimePart]:
    """Mean seconds of a training step by part, over the lines that have them; [] if none do."""
    lines = [line for line in metrics if "time/forward" in line]
    names = list(_STEP_PARTS)
    names += sorted({n[5:] for x in lines for n in x if n.startswith("time/")} - set(names))
    parts = []
    for name in names:
        values = [line[f"time/{name}"] for line in lines if line.get(f"time/{name}") is not None]
        if values:
            parts.append(TimePart(name, sum(values) / len(lines)))
    return parts


def phase_seconds(results: dict[str, Any]) -> list[TimePart]:
    """Wall seconds of each phase of the run; clustering runs beside pretraining and is none."""
    return [
        TimePart(name, float(seconds))
        for name, seconds in (results.get("seconds") or {}).items()
        if isinstance(seconds, int | float) and seconds > 0 and name != "cluster"
    ]
