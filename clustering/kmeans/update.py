"""The update of Lloyd's iteration: from sums of rows to the next centroids.

Pure numpy on small arrays; knows nothing of who added the rows. Invariant: results depend on the
arrays and the seed alone.

Shapes: K clusters, D width.
"""

import numpy as np

from clustering.kmeans.share import Sums
from clustering.kmeans.space import unit_rows

_SPLIT = 1.0 / 1024
"""How far, relatively, an empty cluster and its donor are moved apart."""


def new_centroids(
    total: Sums, old_KD: np.ndarray, spherical: bool, fill_empty: tuple[int, int] | None
) -> np.ndarray:
    """Means of the clusters, float32 [K, D]; without rows, or a direction, the old centroid.

    Args: fill_empty: seed and iteration of the draw that fills empty clusters; None: they stay.
    """
    sums_KD, counts_K = total
    filled = counts_K > 0
    means_KD = old_KD.astype(np.float64)
    means_KD[filled] = sums_KD[filled] / counts_K[filled, None]
    if spherical:
        means_KD = unit_rows(means_KD, old_KD)
    if fill_empty is not None:
        split_empty(means_KD, counts_K, fill_empty)
        if spherical:
            means_KD = unit_rows(means_KD, old_KD)
    return means_KD.astype(np.float32)


def split_empty(means_KD: np.ndarray, counts_K: np.ndarray, entropy: tuple[int, int]) -> None:
    """Give each empty cluster a copy of a large one, both moved apart by 1/1024, in place.

    The donor is drawn with p ~ n - 1, as faiss does, and counts as halved afterwards. Without a
    donor of two rows the cluster stays empty. entropy: seed and iteration.
    """
    empty = np.flatnonzero(counts_K == 0)
    if not len(empty):
        return
    seed, iteration = entropy
    rng = np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, 1 + iteration])
    counts = counts_K.astype(np.float64)
    sign = np.where(np.arange(means_KD.shape[1]) % 2 == 0, _SPLIT, -_SPLIT)
    for cluster in empty:
        weights = np.maximum(counts - 1, 0)
        if not weights.any():
            break
        cumulative = np.cumsum(weights)
        draw = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], "right"))
        donor = min(draw, int(np.flatnonzero(weights)[-1]))
        means_KD[cluster] = means_KD[donor] * (1 + sign)
        means_KD[donor] *= 1 - sign
        counts[cluster] = counts[donor] // 2
        counts[donor] -= counts[cluster]
