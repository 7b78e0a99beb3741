"""Before the first iteration: check the rows, choose grid, origin and sample.

Knows nothing of Lloyd. Invariant: all choices come from the number of rows, their greatest
coordinate and the hashes of their keys, so they do not depend on who holds the rows.
"""

from dataclasses import dataclass

import numpy as np

from clustering.config import ClusteringConfig
from clustering.errors import BadVectors
from clustering.kmeans.exact import grid_exponent
from clustering.kmeans.passes import Passes
from clustering.kmeans.share import Preparation
from clustering.kmeans.views import View


@dataclass(frozen=True)
class Prepared:
    """Rows that are ready to be clustered."""

    fit: Preparation
    """What Lloyd iterates over: all rows or a sample."""
    n_rows: int
    """All rows."""
    n_fit: int
    """Rows of the fit."""
    square_exponent: int
    """Grid of squared lengths."""
    total_D: np.ndarray
    """Sum of the fitted points, float64."""
    sum_of_squares: float
    """Sum of their squared lengths."""


def prepare(passes: Passes, view: View, config: ClusteringConfig, seed: int) -> Prepared:
    """Check the rows and choose grid, origin and sample.

    Euclidean rows are moved to their mean first: it changes no distance, and float32 scores of
    rows far from the origin would lose the digits that tell centroids apart.
    Raises: BadVectors if there are fewer rows than clusters, or rows that cannot be clustered.
    """
    n_rows, max_abs = passes.moments(view)
    if n_rows < config.k:
        raise BadVectors(f"{n_rows} rows for k = {config.k} clusters. Lower k or add rows.")
    exponent = grid_exponent(max_abs, n_rows)
    shift = b""
    if not view.spherical:
        total_D, _ = passes.totals(
            Preparation(view, exponent), _square_exponent(max_abs, view.width, n_rows)
        )
        shift = (total_D / n_rows).astype(np.float32).tobytes()
        max_abs *= 2
        exponent = grid_exponent(max_abs, n_rows)
    below, n_fit = None, n_rows
    wanted = config.k * (config.max_points_per_centroid or n_rows)
    if wanted < n_rows:
        below, n_fit = passes.nth_hash(seed, wanted), wanted
    rows = Preparation(view, exponent, shift, below, seed if below is not None else 0)
    square_exponent = _square_exponent(max_abs, view.width, n_rows)
    total_D, squares = passes.totals(rows, square_exponent)
    sum_of_squares = squares * 2.0**square_exponent
    return Prepared(rows, n_rows, n_fit, square_exponent, total_D, sum_of_squares)


def _square_exponent(max_abs: float, width: int, n_rows: int) -> int:
    return grid_exponent(width * max_abs * max_abs, n_rows)
