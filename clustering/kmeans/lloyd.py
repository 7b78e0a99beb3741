"""Full Lloyd k-means, spherical or Euclidean, over rows held by anybody.

Knows nothing of Ray, rounds or files. Invariant: the clustering is a function of the rows, the
config and the seed: all sums come from `Passes` and are exact, all random numbers from the seed, so
the number of actors, the reducer and restarts change no bit.

Shapes: N rows, D width, K clusters.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from clustering.config import ClusteringConfig
from clustering.errors import BadVectors, ClusteringError, MissingLabels
from clustering.kmeans.grid import Prepared, prepare
from clustering.kmeans.passes import LocalPasses, Passes, Sums, Table
from clustering.kmeans.share import Block, Share
from clustering.kmeans.start import best_start, split_empty
from clustering.kmeans.views import View

_MIN_MASS = 2.0**-24
_MIN_SAMPLE = 4096


@dataclass
class LloydState:
    """All that a resumed fit needs to go on with the same bits."""

    centroids_KD: np.ndarray
    """float32, in the prepared coordinates."""
    offset_K: np.ndarray | None = None
    """Balancing term of the last assignment, float32; None without balancing."""
    inertia: list[float] = field(default_factory=list)
    """One value per iteration, before its update."""
    n_empty: list[int] = field(default_factory=list)
    """Clusters without rows, likewise."""
    done: bool = False
    limit: int = 0
    """Most iterations: fewer after a warm start."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as named arrays."""
        arrays = {
            "centroids": self.centroids_KD,
            "inertia": np.array(self.inertia),
            "n_empty": np.array(self.n_empty, dtype=np.int64),
            "done": np.array(self.done),
            "limit": np.array(self.limit),
        }
        return arrays if self.offset_K is None else {**arrays, "offset": self.offset_K}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "LloydState":
        """Inverse of `arrays`."""
        return cls(
            arrays["centroids"],
            arrays.get("offset"),
            arrays["inertia"].tolist(),
            arrays["n_empty"].tolist(),
            bool(arrays["done"]),
            int(arrays["limit"]),
        )


class Checkpoint(Protocol):
    """Where a fit keeps its state after each iteration."""

    def load(self) -> dict[str, np.ndarray] | None:
        """The last state, or None."""
        ...

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        """Replace the state."""
        ...


@dataclass(frozen=True)
class Clustering:
    """Labels of all rows and the centroids they belong to."""

    keys_N: np.ndarray
    """uint64, sorted."""
    labels_N: np.ndarray
    """int32."""
    distances_N: np.ndarray
    """float32: Euclidean distance to the centroid; spherical: 1 - cosine."""
    centroids_KD: np.ndarray
    """float32, in the coordinates of the rows."""
    counts_K: np.ndarray
    """int64 cluster sizes."""
    inertia: float
    """Sum of squared distances of all rows (spherical: of unit vectors, so 2 (1 - cosine))."""
    history: tuple[float, ...]
    """Inertia of the fitted rows at each iteration."""
    mean_cosine: float
    """Mean over all pairs of rows (rows scaled by their root mean square length)."""

    @property
    def iterations(self) -> int:
        """Lloyd iterations made."""
        return len(self.history)

    @property
    def digest(self) -> str:
        """SHA-256 of labels, centroids and inertia: equal digests, equal bits."""
        digest = hashlib.sha256()
        for array in (self.keys_N, self.labels_N, self.centroids_KD, self.counts_K):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(np.float64(self.inertia).tobytes())
        return digest.hexdigest()


def kmeans(
    x_ND: np.ndarray,
    config: ClusteringConfig,
    seed: int = 0,
    keys_N: np.ndarray | None = None,
    init_KD: np.ndarray | None = None,
    warm: Table | None = None,
) -> Clustering:
    """Cluster an array in this process: the reference for the actor pool, bit for bit.

    Args: x_ND float; keys_N uint64, distinct (default: row numbers); init_KD: centroids to start
        from; warm: sorted keys and labels to start from.
    Raises: BadVectors for rows that cannot be clustered.
    """
    if x_ND.ndim != 2:
        raise BadVectors(f"vectors have shape {x_ND.shape}; expected two dimensions [N, D].")
    keys = np.arange(len(x_ND), dtype=np.uint64) if keys_N is None else keys_N.astype(np.uint64)
    check_distinct(keys)
    source = ArraySource(keys, np.ascontiguousarray(x_ND, dtype=np.float32))
    passes = LocalPasses(Share(source, config.block_rows, config.device))
    view = View("vectors", ((0, x_ND.shape[1]),), "concat", config.spherical)
    return cluster(passes, view, config, seed, init_KD=init_KD, warm=warm)


def cluster(
    passes: Passes,
    view: View,
    config: ClusteringConfig,
    seed: int,
    *,
    init_KD: np.ndarray | None = None,
    warm: Table | None = None,
    checkpoint: Checkpoint | None = None,
) -> Clustering:
    """Prepare, fit and label all rows of `passes`."""
    prepared = prepare(passes, view, config, seed)
    state = fit(passes, prepared, config, seed, init_KD=init_KD, warm=warm, checkpoint=checkpoint)
    return label(passes, prepared, state, config)


def check_distinct(keys: np.ndarray) -> None:
    """Raises: BadVectors if a key occurs twice."""
    ordered = np.sort(keys)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(twice):
        shown = ", ".join(str(key) for key in twice[:5])
        raise BadVectors(
            f"{len(twice)} keys occur more than once: {shown}. Each row needs a key of its own."
        )


def fit(
    passes: Passes,
    prepared: Prepared,
    config: ClusteringConfig,
    seed: int,
    *,
    init_KD: np.ndarray | None = None,
    warm: Table | None = None,
    checkpoint: Checkpoint | None = None,
) -> LloydState:
    """Lloyd iterations until the inertia settles, from the checkpoint if there is one."""
    stored = checkpoint.load() if checkpoint else None
    if stored is not None:
        state = LloydState.from_arrays(stored)
    else:
        state = _start(passes, prepared, config, seed, init_KD, warm)
    while not state.done and len(state.inertia) < state.limit:
        _iterate(passes, prepared, config, seed, state)
        if checkpoint:
            checkpoint.save(state.arrays())
    return state


def _iterate(
    passes: Passes,
    prepared: Prepared,
    config: ClusteringConfig,
    seed: int,
    state: LloydState,
) -> None:
    """One assignment and update, in place."""
    old = state.centroids_KD
    if config.balance == "sinkhorn":
        state.offset_K = _balance(passes, prepared, config, old)
    sums_KD, counts_K = passes.lloyd_sums(prepared.fit, old, _offset(old, state, prepared))
    state.inertia.append(inertia_of(sums_KD, counts_K, old, prepared.sum_of_squares))
    state.n_empty.append(int((counts_K == 0).sum()))
    settled = _settled(state, config.tol) or len(state.inertia) == state.limit
    # The last update moves no donor away from its mean.
    fill = config.empty == "split" and not settled
    new = _update((sums_KD, counts_K), old, prepared, fill, (seed, len(state.inertia)))
    state.done = settled or bool(np.array_equal(new, old))
    state.centroids_KD = new


def _settled(state: LloydState, tol: float) -> bool:
    """Whether the inertia stopped falling, and filling empty clusters stopped helping."""
    if len(state.inertia) < 2:
        return False
    before, now = state.inertia[-2:]
    empty_before, empty_now = state.n_empty[-2:]
    return before - now < tol * before and not 0 < empty_now < empty_before


def inertia_of(
    sums_KD: np.ndarray, counts_K: np.ndarray, centroids_KD: np.ndarray, sum_of_squares: float
) -> float:
    """Sum of squared distances to the centroids, from exact sums: no pass over the rows.

    sum |x - c|^2 = sum |x|^2 - 2 sum_k S_k c_k + sum_k n_k |c_k|^2, in float64 and of one fixed
    order, so it is as independent of the actors as the sums are.
    """
    c = centroids_KD.astype(np.float64)
    cross = float((sums_KD * c).sum())
    lengths = float(((c * c).sum(axis=1) * counts_K).sum())
    return max(0.0, sum_of_squares - 2.0 * cross + lengths)


def label(
    passes: Passes, prepared: Prepared, state: LloydState, config: ClusteringConfig
) -> Clustering:
    """Label every row with its nearest centroid and measure the result.

    Raises: MissingLabels if a row has no label or two: a clustering is whole or not at all.
    """
    everything = prepared.fit.everything()
    centroids = state.centroids_KD
    offset_K = _offset(centroids, state, prepared)
    keys_N, labels_N, squared_N = passes.label(everything, centroids, offset_K)
    if len(keys_N) != prepared.n_rows or (keys_N[1:] == keys_N[:-1]).any():
        raise MissingLabels(
            f"{len(np.unique(keys_N))} distinct keys were labelled of {prepared.n_rows} rows: "
            "rows were lost or occur twice. Make the snapshot again."
        )
    sums_KD, counts_K = passes.label_sums(
        everything, passes.share_out((keys_N, labels_N)), config.k
    )
    total_D, sum_of_squares = prepared.total_D, prepared.sum_of_squares
    if everything != prepared.fit:
        total_D, squares = passes.totals(everything, prepared.square_exponent)
        sum_of_squares = squares * 2.0**prepared.square_exponent
    shift = prepared.fit.shift_D
    n = prepared.n_rows
    spherical = prepared.fit.view.spherical
    return Clustering(
        keys_N,
        labels_N,
        squared_N / np.float32(2) if spherical else np.sqrt(squared_N),
        centroids if shift is None else centroids + shift,
        counts_K,
        inertia_of(sums_KD, counts_K, centroids, sum_of_squares),
        tuple(state.inertia),
        mean_cosine(total_D, sum_of_squares, n),
    )


def mean_cosine(total_D: np.ndarray, sum_of_squares: float, n: int) -> float:
    """Mean cosine of all pairs: |sum x|^2 holds every pair's product once each way."""
    if n < 2 or sum_of_squares == 0:
        return 1.0
    return min(1.0, (float(total_D @ total_D) - sum_of_squares) / (sum_of_squares * (n - 1)))


def _start(
    passes: Passes,
    prepared: Prepared,
    config: ClusteringConfig,
    seed: int,
    init_KD: np.ndarray | None,
    warm: Table | None,
) -> LloydState:
    """Centroids before the first iteration, float32 [K, D], in prepared coordinates."""
    shift, k = prepared.fit.shift_D, config.k
    if init_KD is not None:
        expected = (k, prepared.fit.view.width)
        if init_KD.shape != expected:
            raise BadVectors(f"init has shape {init_KD.shape}; k and the rows ask for {expected}.")
        start = init_KD.astype(np.float64) - (0 if shift is None else shift)
        centroids = _on_sphere(start, prepared).astype(np.float32)
        return LloydState(centroids, limit=config.iterations)
    if warm is not None:
        if (warm[1] >= k).any():
            raise ClusteringError(f"warm labels go up to {warm[1].max()}, k is {k}. Start cold.")
        sums = passes.label_sums(prepared.fit, passes.share_out(warm), k)
        if sums[1].any():
            origin = np.zeros((k, prepared.fit.view.width), dtype=np.float32)
            centroids = _update(sums, origin, prepared, True, (seed, 0))
            return LloydState(centroids, limit=config.warm_iterations)
    if config.init == "kmeans++":
        n = min(prepared.n_fit, max(_MIN_SAMPLE, k * config.init_sample))
        sample = passes.points_below(prepared.fit, seed, passes.nth_hash(seed, n))
        trials = max(1, min(config.init_trials, 1000 // k))
        start = best_start(sample, k, seed, trials, prepared.fit.view.spherical)
        return LloydState(start, limit=config.iterations)
    first = passes.points_below(prepared.fit, seed, passes.nth_hash(seed, k))
    return LloydState(first, limit=config.iterations)


def _update(
    sums: Sums,
    old_KD: np.ndarray,
    prepared: Prepared,
    fill_empty: bool,
    entropy: tuple[int, int],
) -> np.ndarray:
    """New centroids, float32 [K, D]."""
    sums_KD, counts_K = sums
    filled = counts_K > 0
    means = old_KD.astype(np.float64)
    means[filled] = sums_KD[filled] / counts_K[filled, None]
    means = _on_sphere(means, prepared, old_KD)
    if fill_empty:
        split_empty(means, counts_K, entropy)
        means = _on_sphere(means, prepared, old_KD)
    return means.astype(np.float32)


def _on_sphere(
    means_KD: np.ndarray, prepared: Prepared, fallback_KD: np.ndarray | None = None
) -> np.ndarray:
    """Unit length for a spherical clustering; a mean of zero length keeps the fallback."""
    if not prepared.fit.view.spherical:
        return means_KD
    length = np.sqrt((means_KD * means_KD).sum(axis=1, keepdims=True))
    unit = means_KD / np.where(length > 0, length, 1.0)
    return unit if fallback_KD is None else np.where(length > 0, unit, fallback_KD)


def _offset(centroids_KD: np.ndarray, state: LloydState, prepared: Prepared) -> np.ndarray | None:
    """What is added to x c' before the largest is taken."""
    if prepared.fit.view.spherical:
        return state.offset_K
    c = centroids_KD.astype(np.float64)
    return (-0.5 * (c * c).sum(axis=1)).astype(np.float32)


def _balance(
    passes: Passes, prepared: Prepared, config: ClusteringConfig, centroids_KD: np.ndarray
) -> np.ndarray:
    """Offset after Sinkhorn iterations towards equal sizes (Cuturi 2013; soft when few)."""
    log_scale_K = np.zeros(config.k)
    centroids = passes.share_out(centroids_KD)
    for _ in range(config.balance_iterations):
        offset_K = (config.balance_epsilon * log_scale_K).astype(np.float32)
        mass_K = passes.balance_mass(prepared.fit, centroids, offset_K, config.balance_epsilon)
        log_scale_K += np.log(prepared.n_fit / config.k) - np.log(np.maximum(mass_K, _MIN_MASS))
    return (config.balance_epsilon * log_scale_K).astype(np.float32)


class ArraySource:
    """An array in memory, as one block sorted by key."""

    keep_rows = True

    def __init__(self, keys_N: np.ndarray, rows_NW: np.ndarray) -> None:
        order = np.argsort(keys_N, kind="stable")
        self.token = f"array-{id(self)}"
        self._block = Block(keys_N[order], rows_NW[order])

    def blocks(self) -> Iterator[Block]:
        """The one block."""
        yield self._block
