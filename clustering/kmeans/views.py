"""What of a row is clustered, and whom the labels teach.

Pure numpy: knows streams only as named slices of a row. Invariant: `points` of a row depend on that
row alone.

Shapes: N rows, W width of a row, D width of a point.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clustering.config import ClusteringConfig
from clustering.errors import ClusteringError

Combine = Literal["concat", "mean", "each"]


@dataclass(frozen=True)
class View:
    """How a row becomes the point that is clustered."""

    name: str
    slices: tuple[tuple[int, int], ...]
    """Start and stop of each slice in the row."""
    combine: Combine
    """`concat` or `mean` of the slices; `each`: side by side, every slice of unit length."""
    spherical: bool
    """Slices and the point itself are scaled to unit length."""

    @property
    def width(self) -> int:
        """Width D of a point."""
        widths = [stop - start for start, stop in self.slices]
        return widths[0] if self.combine == "mean" else sum(widths)


@dataclass(frozen=True)
class Target:
    """One clustering of a round: a view, its seed and the streams that learn from its labels."""

    name: str
    view: View
    head: int
    teaches: tuple[str, ...]


def stream_slices(streams: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Start and stop of each named slice of a bank row."""
    slices, start = {}, 0
    for name, width in streams.items():
        slices[name] = (start, start + width)
        start += width
    return slices


def targets_of(config: ClusteringConfig, streams: Mapping[str, int]) -> list[Target]:
    """The clusterings a round makes.

    A slice that is not clustered (the fusion of the others) is taught by every clustering.
    Raises: ClusteringError if the config names a slice that rows do not have, or the mean of
        slices of different widths.
    """
    missing = [name for name in config.streams if name not in streams]
    if missing:
        raise ClusteringError(
            f"clustering.streams names {missing}, but bank rows hold {list(streams)}. "
            "Name slices that rows have."
        )
    slices = stream_slices(streams)
    others = tuple(name for name in streams if name not in config.streams)
    if config.targets in ("mean", "concat"):
        joint = _joint_view(config, slices)
        views = [(joint, tuple(streams))]
    else:
        views = []
        for name in config.streams:
            view = View(name, (slices[name],), "concat", config.spherical)
            peers = tuple(s for s in config.streams if s != name)
            views.append((view, (peers if config.targets == "swapped" else (name,)) + others))
    return [
        Target(view.name if config.heads == 1 else f"{view.name}-{head}", view, head, teaches)
        for view, teaches in views
        for head in range(config.heads)
    ]


def _joint_view(config: ClusteringConfig, slices: Mapping[str, tuple[int, int]]) -> View:
    chosen = tuple(slices[name] for name in config.streams)
    widths = {name: slices[name][1] - slices[name][0] for name in config.streams}
    if config.targets == "mean":
        if len(set(widths.values())) > 1:
            raise ClusteringError(
                f"clustering.targets = mean needs slices of one width, found {widths}. "
                'Use "concat", or project the streams to one width.'
            )
        return View("mean", chosen, "mean", config.spherical)
    return View("concat", chosen, "concat", config.spherical)


def each_stream(streams: Mapping[str, int]) -> View:
    """The view whose sums are the prototypes: all slices side by side, each of unit length."""
    return View("each", tuple(stream_slices(streams).values()), "each", True)


def points(rows_NW: np.ndarray, view: View) -> np.ndarray:
    """Points of the view, float32 [N, D], not yet on a grid.

    A spherical point of zero length (two opposite streams) stays zero.
    """
    parts = [rows_NW[:, start:stop].astype(np.float64) for start, stop in view.slices]
    if view.spherical and len(parts) > 1:
        parts = [_unit(part) for part in parts]
    if view.combine == "mean":
        joined = np.mean(parts, axis=0)
    else:
        joined = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    if view.spherical and (view.combine != "each" or len(parts) == 1):
        joined = _unit(joined)
    return joined.astype(np.float32)


def _unit(part: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.einsum("nd,nd->n", part, part))[:, None]
    return np.divide(part, length, out=part, where=length > 0)
