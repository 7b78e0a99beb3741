"""STARTS: how a fit gets its first centroids, by the name that `init` has in the config.

Knows nothing of iterations over all rows. Invariant: a start depends on the rows and the seed
alone, so that it is the same whoever holds them.

A new start is a function here, an entry of `STARTS` and a name in `clustering.config.Init`.

Shapes: N rows, D width, K clusters.
"""

from collections.abc import Callable

import numpy as np

from clustering.config import Init, KMeansConfig
from clustering.errors import BadVectors, ClusteringError
from clustering.kmeans.assign import assign, one_blas_thread
from clustering.kmeans.checkpoint import LloydState
from clustering.kmeans.exact import add_by_label
from clustering.kmeans.fit_plan import FitPlan
from clustering.kmeans.label_table import LabelTable
from clustering.kmeans.passes import Passes
from clustering.kmeans.space import unit_rows
from clustering.kmeans.update import new_centroids

_MIN_SAMPLE = 4096
"""Rows that k-means++ looks at even for few clusters: they cost nothing."""
_TRIAL_ITERATIONS = 8
_TRIAL_CENTROIDS = 1000
"""Centroids of all starts of k-means++ together: above K = 250 one start takes seconds."""


def start(
    passes: Passes,
    plan: FitPlan,
    config: KMeansConfig,
    seed: int,
    *,
    init_KD: np.ndarray | None = None,
    warm: LabelTable | None = None,
) -> LloydState:
    """The state before the first iteration: from centroids, from labels, or cold.

    Labels of which no row is left start cold.
    Raises: BadVectors for centroids of another shape; ClusteringError for labels above k.
    """
    if init_KD is not None:
        return LloydState(_as_planned(init_KD, plan, config.k), config.iterations)
    if warm is not None:
        if (warm.labels_N >= config.k).any():
            raise ClusteringError(
                f"warm labels go up to {warm.labels_N.max()}, k is {config.k}. Start cold."
            )
        total = passes.label_sums(plan.rule, passes.share_out(warm), config.k)
        if total.counts.any():
            origin_KD = np.zeros((config.k, plan.rule.space.width), dtype=np.float32)
            # A class that vanished since the round before is an empty cluster from the start.
            centroids_KD = new_centroids(total, origin_KD, plan.spherical, fill_empty=(seed, 0))
            return LloydState(centroids_KD, config.warm_iterations)
    return LloydState(STARTS[config.init](passes, plan, config, seed), config.iterations)


def _as_planned(init_KD: np.ndarray, plan: FitPlan, k: int) -> np.ndarray:
    """Centroids of the rows' coordinates in those of the plan, float32 [K, D]."""
    expected = (k, plan.rule.space.width)
    if init_KD.shape != expected:
        raise BadVectors(f"init has shape {init_KD.shape}; k and the rows ask for {expected}.")
    shift_D = plan.rule.shift_D
    centroids_KD = init_KD.astype(np.float64) - (0 if shift_D is None else shift_D)
    if plan.spherical:
        centroids_KD = unit_rows(centroids_KD)
    return np.asarray(centroids_KD, dtype=np.float32)


def random_rows(passes: Passes, plan: FitPlan, config: KMeansConfig, seed: int) -> np.ndarray:
    """The K rows of smallest hash, float32 [K, D]: a draw that needs no order of the rows."""
    return passes.points_below(plan.rule, seed, passes.nth_hash(seed, config.k))


def spread_rows(passes: Passes, plan: FitPlan, config: KMeansConfig, seed: int) -> np.ndarray:
    """The best of some k-means++ starts on a sample of the rows, float32 [K, D]."""
    n = min(plan.n_fit, max(_MIN_SAMPLE, config.k * config.init_sample))
    sample_ND = passes.points_below(plan.rule, seed, passes.nth_hash(seed, n))
    trials = max(1, min(config.init_trials, _TRIAL_CENTROIDS // config.k))
    return _best_start(sample_ND, config.k, seed, trials, plan.spherical)


Start = Callable[[Passes, FitPlan, KMeansConfig, int], np.ndarray]
"""From the rows, the plan, the config and the seed to centroids float32 [K, D]."""

STARTS: dict[Init, Start] = {"random": random_rows, "kmeans++": spread_rows}
"""Every cold start."""


def _best_start(x_ND: np.ndarray, k: int, seed: int, trials: int, spherical: bool) -> np.ndarray:
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
        c = unit_rows(c)
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
    return np.asarray(np.maximum(lengths[rows][:, None] - 2 * products + lengths, 0.0))
