"""PointSpace: which slices of a row are clustered, how they are joined, and unit length.

Pure numpy; knows nothing of whom labels teach. Invariant: the point of a row depends on that row
alone.

Shapes: N rows, W width of a row, D width of a point.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Combine = Literal["concat", "mean", "each"]


@dataclass(frozen=True)
class PointSpace:
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

    def points(self, rows_NW: np.ndarray) -> np.ndarray:
        """Points of rows, float32 [N, D], not yet on a grid.

        A spherical point of zero length (two opposite streams) stays zero.
        """
        parts = [rows_NW[:, start:stop].astype(np.float64) for start, stop in self.slices]
        if self.spherical and len(parts) > 1:
            # Before they are joined: the longer stream would otherwise decide alone.
            parts = [unit_rows(part, out=part) for part in parts]
        if self.combine == "mean":
            joined = np.mean(parts, axis=0)
        else:
            joined = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        if self.spherical and (self.combine != "each" or len(parts) == 1):
            joined = unit_rows(joined, out=joined)
        return np.asarray(joined, dtype=np.float32)


def whole_rows(width: int, spherical: bool) -> PointSpace:
    """The space of rows that are points already: nothing is cut out of them or joined."""
    return PointSpace("vectors", ((0, width),), "concat", spherical)


def unit_rows(
    x_ND: np.ndarray, fallback_ND: np.ndarray | None = None, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Rows of unit length, float64 [N, D]; a row of zeros stays zero or takes the fallback's.

    The only place that normalises: two ways to add the squares would differ in the last bit, and
    bits are what a round is compared by. Args: out: `x_ND` itself spares a second array.
    """
    length_N1 = np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND))[:, None]
    if out is None:
        out = np.zeros_like(x_ND) if fallback_ND is None else fallback_ND.astype(x_ND.dtype)
    np.divide(x_ND, length_N1, out=out, where=length_N1 > 0)
    return out
