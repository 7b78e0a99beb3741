"""Lloyd's iterations, spherical or Euclidean, from planned rows to a `Clustering`.

Knows nothing of Ray, rounds or files. Invariant: the clustering is a function of the rows, the
config and the seed: all sums come from `Passes` and are exact, all random numbers from the seed, so
the number of actors, the reducer and restarts change no bit.

Shapes: N rows, D width, K clusters.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from clustering.config import KMeansConfig
from clustering.errors import BadVectors, ClusteringError, MissingLabels
from clustering.kmeans.checkpoint import Checkpoint, LloydState
from clustering.kmeans.fit_plan import FitPlan, plan_fit
from clustering.kmeans.label_table import LabelTable
from clustering.kmeans.passes import LocalPasses, Passes
from clustering.kmeans.share import RowBlock, Share, Sums
from clustering.kmeans.space import PointSpace, whole_rows
from clustering.kmeans.start import start
from clustering.kmeans.update import new_centroids

_MIN_MASS = 2.0**-24
"""Least mass of a cluster in the balancing: an empty one would ask for an infinite offset."""


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
    config: KMeansConfig,
    seed: int = 0,
    *,
    keys_N: np.ndarray | None = None,
    init_KD: np.ndarray | None = None,
    warm: LabelTable | None = None,
) -> Clustering:
    """Cluster an array in this process: the reference for the actor pool, bit for bit.

    Args: x_ND float; keys_N uint64, distinct (default: row numbers); init_KD: centroids to start
        from; warm: labels to start from.
    Raises: BadVectors for rows that cannot be clustered.
    """
    if x_ND.ndim != 2:
        raise BadVectors(f"vectors have shape {x_ND.shape}; expected two dimensions [N, D].")
    keys = np.arange(len(x_ND), dtype=np.uint64) if keys_N is None else keys_N.astype(np.uint64)
    check_distinct(keys)
    source = ArraySource(keys, np.ascontiguousarray(x_ND, dtype=np.float32))
    passes = LocalPasses(Share(source, config.block_rows, config.device))
    space = whole_rows(x_ND.shape[1], config.spherical)
    return cluster(passes, space, config, seed, init_KD=init_KD, warm=warm)


def cluster(
    passes: Passes,
    space: PointSpace,
    config: KMeansConfig,
    seed: int,
    *,
    init_KD: np.ndarray | None = None,
    warm: LabelTable | None = None,
    seeds: LabelTable | None = None,
    checkpoint: Checkpoint | None = None,
) -> Clustering:
    """Plan, fit and label all rows of `passes`.

    Args: seeds: rows whose label is known: the fit starts from their means alone, each pulls its
        own centroid as `seed_weight` rows would, and it keeps its label. Its distance is to the
        nearest centroid all the same. `warm` is not looked at then.
    Source: seeded k-means, Basu et al. 2002 (Semi-supervised clustering by seeding); the weight,
        between their two variants, is ours.
    """
    plan = plan_fit(passes, space, config, seed)
    pull = None if seeds is None else _pull(passes, plan, config, seeds)
    state = fit(
        passes,
        plan,
        config,
        seed,
        init_KD=init_KD,
        warm=seeds or warm,
        pull=pull,
        checkpoint=checkpoint,
    )
    made = label(passes, plan, state, config)
    return made if seeds is None else _with_known(made, seeds)


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
    plan: FitPlan,
    config: KMeansConfig,
    seed: int,
    *,
    init_KD: np.ndarray | None = None,
    warm: LabelTable | None = None,
    pull: Sums | None = None,
    checkpoint: Checkpoint | None = None,
) -> LloydState:
    """Lloyd iterations until the inertia settles, from the checkpoint if there is one.

    Args: pull: of rows whose cluster is known, added to those of every iteration.
    """
    state = checkpoint.load() if checkpoint else None
    if state is None:
        state = start(passes, plan, config, seed, init_KD=init_KD, warm=warm)
    while not state.done and len(state.inertia) < state.limit:
        _iterate(passes, plan, config, seed, state, pull=pull)
        if checkpoint:
            checkpoint.save(state)
    return state


def _pull(passes: Passes, plan: FitPlan, config: KMeansConfig, seeds: LabelTable) -> Sums:
    """What known rows add to their clusters: whole multiples of exact sums are exact too.

    Raises: ClusteringError if none of them is among the rows.
    """
    # Of all rows: a fit on a sample may have drawn none of a class's seeds.
    of_seeds = passes.label_sums(plan.rule.everything(), passes.share_out(seeds), config.k)
    if not of_seeds.counts.any():
        raise ClusteringError(
            f"none of the {len(seeds.keys_N):,} rows with a known label is among the "
            f"{plan.n_rows:,} rows to cluster. Cluster the rows they belong to."
        )
    return Sums(of_seeds.sums * config.seed_weight, of_seeds.counts * config.seed_weight)


def _with_known(made: Clustering, seeds: LabelTable) -> Clustering:
    """The same clustering, in which known rows have their own label."""
    known_N = seeds.lookup(made.keys_N)
    labels_N = np.where(known_N >= 0, known_N, made.labels_N).astype(np.int32)
    return replace(
        made, labels_N=labels_N, counts_K=np.bincount(labels_N, minlength=len(made.counts_K))
    )


def _iterate(
    passes: Passes,
    plan: FitPlan,
    config: KMeansConfig,
    seed: int,
    state: LloydState,
    *,
    pull: Sums | None = None,
) -> None:
    """One assignment and update, in place."""
    old = state.centroids_KD
    if config.balance == "sinkhorn":
        state.offset_K = _balance(passes, plan, config, old)
    total = passes.lloyd_sums(plan.rule, old, _offset(state, plan))
    sum_of_squares = plan.sum_of_squares
    if pull is not None:
        total = Sums(total.sums + pull.sums, total.counts + pull.counts)
        # A known row counts as an average one.
        sum_of_squares *= 1 + int(pull.counts.sum()) / plan.n_fit
    sums_KD, counts_K = total
    state.inertia.append(inertia_of(sums_KD, counts_K, old, sum_of_squares))
    state.n_empty.append(int((counts_K == 0).sum()))
    settled = _settled(state, config.tol) or len(state.inertia) == state.limit
    # The last update moves no donor away from its mean.
    fill = config.empty == "split" and not settled
    entropy = (seed, len(state.inertia)) if fill else None
    new = new_centroids(total, old, plan.spherical, fill_empty=entropy)
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


def label(passes: Passes, plan: FitPlan, state: LloydState, config: KMeansConfig) -> Clustering:
    """Label every row with its nearest centroid and measure the result.

    Raises: MissingLabels if a row has no label or two: a clustering is whole or not at all.
    """
    everything = plan.rule.everything()
    centroids = state.centroids_KD
    keys_N, labels_N, squared_N = passes.label(everything, centroids, _offset(state, plan))
    if len(keys_N) != plan.n_rows or (keys_N[1:] == keys_N[:-1]).any():
        raise MissingLabels(
            f"{len(np.unique(keys_N))} distinct keys were labelled of {plan.n_rows} rows: "
            "rows were lost or occur twice. Freeze the rows again."
        )
    table = passes.share_out(LabelTable(keys_N, labels_N))
    sums_KD, counts_K = passes.label_sums(everything, table, config.k)
    total_D, sum_of_squares = plan.total_D, plan.sum_of_squares
    if everything != plan.rule:
        total_D, sum_of_squares = passes.totals(everything, plan.square_exponent)
    shift = plan.rule.shift_D
    return Clustering(
        keys_N=keys_N,
        labels_N=labels_N,
        distances_N=squared_N / np.float32(2) if plan.spherical else np.sqrt(squared_N),
        centroids_KD=centroids if shift is None else centroids + shift,
        counts_K=counts_K,
        inertia=inertia_of(sums_KD, counts_K, centroids, sum_of_squares),
        history=tuple(state.inertia),
        mean_cosine=mean_cosine(total_D, sum_of_squares, plan.n_rows),
    )


def mean_cosine(total_D: np.ndarray, sum_of_squares: float, n: int) -> float:
    """Mean cosine of all pairs: |sum x|^2 holds every pair's product once each way."""
    if n < 2 or sum_of_squares == 0:
        return 1.0
    return min(1.0, (float(total_D @ total_D) - sum_of_squares) / (sum_of_squares * (n - 1)))


def _offset(state: LloydState, plan: FitPlan) -> np.ndarray | None:
    """What is added to x c' before the largest is taken."""
    if plan.spherical:
        return state.offset_K
    c = state.centroids_KD.astype(np.float64)
    return np.asarray(-0.5 * (c * c).sum(axis=1), dtype=np.float32)


def _balance(
    passes: Passes, plan: FitPlan, config: KMeansConfig, centroids_KD: np.ndarray
) -> np.ndarray:
    """Offset after Sinkhorn iterations towards equal sizes (Cuturi 2013; soft when few)."""
    log_scale_K = np.zeros(config.k)
    centroids = passes.share_out(centroids_KD)
    for _ in range(config.balance_iterations):
        offset_K = (config.balance_epsilon * log_scale_K).astype(np.float32)
        mass_K = passes.balance_mass(plan.rule, centroids, offset_K, config.balance_epsilon)
        log_scale_K += np.log(plan.n_fit / config.k) - np.log(np.maximum(mass_K, _MIN_MASS))
    return (config.balance_epsilon * log_scale_K).astype(np.float32)


class ArraySource:
    """An array in memory, as one block sorted by key."""

    keep_rows = True

    def __init__(self, keys_N: np.ndarray, rows_NW: np.ndarray) -> None:
        order = np.argsort(keys_N, kind="stable")
        self.token = f"array-{id(self)}"
        self._block = RowBlock(keys_N[order], rows_NW[order])

    def blocks(self) -> Iterator[RowBlock]:
        """The one block."""
        yield self._block
