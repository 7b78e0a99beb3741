"""FitPlan: the grid, origin and sample of a fit, chosen before its first iteration.

Knows nothing of Lloyd. Invariant: all choices come from the number of rows, their greatest
coordinate and the hashes of their keys, so they do not depend on who holds the rows.
"""

from dataclasses import dataclass

import numpy as np

from clustering.config import KMeansConfig
from clustering.errors import BadVectors
from clustering.kmeans.exact import grid_exponent
from clustering.kmeans.passes import Passes
from clustering.kmeans.share import PointRule
from clustering.kmeans.space import PointSpace


@dataclass(frozen=True)
class FitPlan:
    """What a fit iterates over, and what is known of it beforehand."""

    rule: PointRule
    """The points of the fit: of all rows or of a sample."""
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

    @property
    def spherical(self) -> bool:
        """Whether points and centroids have unit length."""
        return self.rule.space.spherical


def plan_fit(passes: Passes, space: PointSpace, config: KMeansConfig, seed: int) -> FitPlan:
    """Check the rows and choose grid, origin and sample.

    Euclidean rows are moved to their mean first: it changes no distance, and float32 scores of
    rows far from the origin would lose the digits that tell centroids apart.
    Raises: BadVectors if there are fewer rows than clusters, or rows that cannot be clustered.
    """
    n_rows, max_abs = passes.moments(space)
    if n_rows < config.k:
        raise BadVectors(f"{n_rows} rows for k = {config.k} clusters. Lower k or add rows.")
    shift = b""
    if not space.spherical:
        unshifted = PointRule(space, grid_exponent(max_abs, n_rows))
        total_D, _ = passes.totals(unshifted, _square_exponent(max_abs, space.width, n_rows))
        shift = (total_D / n_rows).astype(np.float32).tobytes()
        max_abs *= 2  # A row may lie as far on the other side of the mean.
    below, n_fit = None, n_rows
    wanted = config.k * (config.max_points_per_centroid or n_rows)
    if wanted < n_rows:
        below, n_fit = passes.nth_hash(seed, wanted), wanted
    rule = PointRule(
        space,
        grid_exponent(max_abs, n_rows),
        shift=shift,
        sample_below=below,
        sample_seed=seed if below is not None else 0,
    )
    square_exponent = _square_exponent(max_abs, space.width, n_rows)
    total_D, sum_of_squares = passes.totals(rule, square_exponent)
    return FitPlan(rule, n_rows, n_fit, square_exponent, total_D, sum_of_squares)


def _square_exponent(max_abs: float, width: int, n_rows: int) -> int:
    return grid_exponent(width * max_abs * max_abs, n_rows)
