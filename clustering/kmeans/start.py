"""Where centroids come from when no row says so: k-means++ and the filling of empty clusters.

Pure numpy on small arrays. Invariant: results depend on the arrays and the seed alone.
"""

import numpy as np

from clustering.kmeans.assign import assign, one_blas_thread
from clustering.kmeans.exact import add_by_label

_SPLIT = 1.0 / 1024
_TRIAL_ITERATIONS = 8


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


def best_start(x_ND: np.ndarray, k: int, seed: int, trials: int, spherical: bool) -> np.ndarray:
    """The best of several k-means++ starts, each improved by a few iterations on the sample.

    A single start often leaves two clusters in one class and two classes in one cluster, and Lloyd
    never repairs it. Args: x_ND float32 on a grid. Returns float32 [K, D].
    """
    best, lowest = None, np.inf
    for trial in range(trials):
        centroids = kmeans_plus_plus(x_ND, k, seed + trial)
        if trials == 1:
            return centroids
        for _ in range(_TRIAL_ITERATIONS):
            centroids, inertia = _small_step(x_ND, centroids, spherical)
        if inertia < lowest:
            best, lowest = centroids, inertia
    assert best is not None
    return best


def _small_step(
    x_ND: np.ndarray, centroids_KD: np.ndarray, spherical: bool
) -> tuple[np.ndarray, float]:
    c = centroids_KD.astype(np.float64)
    offset_K = None if spherical else (-0.5 * (c * c).sum(axis=1)).astype(np.float32)
    with one_blas_thread():
        labels = assign(x_ND, centroids_KD, offset_K, 1024)
    difference = x_ND - c[labels]
    sums_KD = np.zeros(c.shape)
    add_by_label(x_ND, labels, sums_KD)
    filled = np.bincount(labels, minlength=len(c)) > 0
    c[filled] = sums_KD[filled] / np.bincount(labels, minlength=len(c))[filled, None]
    if spherical:
        length = np.sqrt((c * c).sum(axis=1, keepdims=True))
        c /= np.where(length > 0, length, 1.0)
    return c.astype(np.float32), float((difference * difference).sum())


def kmeans_plus_plus(x_ND: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Greedy k-means++: k rows, each the best of 2 + log k draws by squared distance.

    Args: x_ND float32 sample in a fixed order. Returns float32 [K, D].
    Source: Arthur and Vassilvitskii 2007.
    """
    rng = np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, 0])
    lengths = np.einsum("nd,nd->n", x_ND, x_ND, dtype=np.float64)
    chosen = [int(rng.integers(len(x_ND)))]
    trials = 2 + int(np.log(k))
    with one_blas_thread():
        nearest = _squared_to(x_ND, lengths, chosen)[0]
        for _ in range(1, k):
            cumulative = np.cumsum(nearest)
            if cumulative[-1] > 0:
                draws = np.searchsorted(cumulative, rng.random(trials) * cumulative[-1], "right")
                candidates = np.minimum(draws, len(x_ND) - 1).tolist()
            else:
                candidates = rng.integers(len(x_ND), size=trials).tolist()
            closer = np.minimum(nearest, _squared_to(x_ND, lengths, candidates))
            best = int(closer.sum(axis=1).argmin())
            chosen.append(candidates[best])
            nearest = closer[best]
    return x_ND[chosen]


def _squared_to(x_ND: np.ndarray, lengths: np.ndarray, rows: list[int]) -> np.ndarray:
    products = (x_ND[rows] @ x_ND.T).astype(np.float64)
    return np.maximum(lengths[rows][:, None] - 2 * products + lengths, 0.0)
