"""Exact sums on a grid, which do not depend on the order of their terms.

Pure numpy: knows nothing of k-means. Rows are snapped to a power-of-two grid that is coarse enough
for every possible sum of them to be a whole number of grid units below 2^53; float64 then adds
without rounding, so any grouping of the rows over actors gives the same bits.

Shapes: N rows, D width, K clusters.
"""

import math

import numpy as np
from scipy.sparse import _sparsetools

GRID_BITS = 30
"""Bits kept below the largest magnitude: float32 has 24, so only values below 1/64 of it change."""

_BLOCK_ROWS = 256


def grid_exponent(max_abs: float, n_rows: int) -> int:
    """Exponent e of the grid 2^e on which sums of `n_rows` values up to `max_abs` are exact.

    The grid is 2^-30 of the power of two above `max_abs`, and coarser beyond 2^23 rows, where even
    all rows in one cluster must stay below 2^53 grid units. 2^-30 for unit vectors.
    """
    if max_abs == 0:
        return -GRID_BITS
    mantissa, power = math.frexp(max_abs)
    magnitude = power - 1 if mantissa == 0.5 else power
    return magnitude - min(GRID_BITS, 53 - max(n_rows - 1, 0).bit_length())


def snap(values: np.ndarray, exponent: int) -> np.ndarray:
    """Values rounded to multiples of 2^exponent, as float32 (exactly representable)."""
    scaled = np.rint(values.astype(np.float64) * 2.0**-exponent)
    return (scaled * 2.0**exponent).astype(np.float32)


def add_by_label(
    x_ND: np.ndarray, labels_N: np.ndarray, sums_KD: np.ndarray, weight: float = 1.0
) -> None:
    """Add each row, times a weight of 1 or -1, to the sum of its label, in place.

    Args: x_ND float32 on a grid; labels_N integer in 0..K-1; sums_KD float64, C order.
    scipy's column-sparse product is used directly, because its public form allocates and adds a
    second [K, D] array per block; np.add.at takes 10 times as long.
    """
    k, width = sums_KD.shape
    weights = np.full(_BLOCK_ROWS, weight)
    indptr = np.arange(_BLOCK_ROWS + 1, dtype=np.int32)
    labels = np.ascontiguousarray(labels_N, dtype=np.int32)
    for start in range(0, len(x_ND), _BLOCK_ROWS):
        block = x_ND[start : start + _BLOCK_ROWS].astype(np.float64)
        n = len(block)
        _sparsetools.csc_matvecs(
            *(k, n, width, indptr[: n + 1], labels[start : start + n], weights[:n]),
            block.ravel(),
            sums_KD.reshape(-1),
        )


def fixed_point_sum(values: np.ndarray, exponent: int) -> int:
    """Sum of values rounded to multiples of 2^exponent, in those units; exact below 2^63."""
    return int(np.rint(values * 2.0**-exponent).astype(np.int64).sum())
