"""One-process k-means: equal to faiss and scikit-learn, never rising, sane on odd input."""

import itertools
from typing import get_args

import faiss
import numpy as np
import pytest
import sklearn.cluster

from clustering.config import Init, KMeansConfig
from clustering.errors import BadVectors, ClusteringError
from clustering.kmeans.label_table import LabelTable
from clustering.kmeans.lloyd import Clustering, cluster, kmeans
from clustering.kmeans.space import whole_rows
from clustering.kmeans.start import STARTS
from clustering.rounds.health import effective_clusters, nmi


@pytest.fixture(scope="module")
def data(mixture):
    return mixture(n=6000, k=20, width=48, noise=1.2)


@pytest.mark.parametrize("iterations", [1, 5, 20])
@pytest.mark.parametrize("spherical", [True, False])
def test_equals_faiss_from_the_same_start(data, iterations: int, spherical: bool) -> None:
    start = data.x[:20].copy()
    config = KMeansConfig(k=20, iterations=iterations, tol=0, spherical=spherical)
    ours = kmeans(data.x, config, init_KD=start)
    theirs = faiss.Kmeans(
        48, 20, niter=iterations, spherical=spherical, max_points_per_centroid=10**9
    )
    theirs.train(data.x, init_centroids=start)
    assert np.abs(ours.centroids_KD - theirs.centroids).max() <= 1e-6
    assert (theirs.index.search(data.x, 1)[1][:, 0] == ours.labels_N).mean() >= 0.9999


@pytest.mark.parametrize("iterations", [1, 5, 20])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_equals_scikit_learn_from_the_same_start(data, iterations: int, offset: float) -> None:
    x = data.x + np.float32(offset)
    start = x[:20].copy()
    config = KMeansConfig(k=20, iterations=iterations, tol=0, spherical=False)
    ours = kmeans(x, config, init_KD=start)
    theirs = sklearn.cluster.KMeans(
        20, init=start.astype(np.float64), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd"
    ).fit(x.astype(np.float64))
    assert np.abs(ours.centroids_KD - theirs.cluster_centers_).max() <= 1e-6 * max(1.0, offset)
    assert (theirs.labels_ == ours.labels_N).mean() >= 0.9999
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_inertia_never_rises(data, spherical: bool, init: str) -> None:
    config = KMeansConfig(k=20, iterations=30, tol=0, spherical=spherical, init=init)
    history = kmeans(data.x, config, seed=3).history
    assert len(history) > 3
    assert all(now <= before * (1 + 1e-9) for before, now in itertools.pairwise(history))


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_planted_mixture_is_recovered(mixture, spherical: bool, init: str) -> None:
    data = mixture(n=6000, k=20, width=48, noise=0.6, seed=5)
    config = KMeansConfig(k=20, spherical=spherical, init=init)
    made = kmeans(data.x, config, seed=1)
    assert nmi(made.labels_N, data.truth) >= 0.95


def test_inertia_is_the_sum_of_squared_distances(data) -> None:
    made = kmeans(data.x, KMeansConfig(k=20, iterations=4, spherical=False), seed=0)
    squared = ((data.x - made.centroids_KD[made.labels_N]).astype(np.float64) ** 2).sum()
    assert made.inertia == pytest.approx(squared, rel=1e-6)
    assert (made.distances_N.astype(np.float64) ** 2).sum() == pytest.approx(squared, rel=1e-5)


def test_spherical_distance_is_one_minus_cosine(data) -> None:
    made = kmeans(3 * data.x, KMeansConfig(k=20, iterations=4), seed=0)
    cosine = (data.x * made.centroids_KD[made.labels_N]).sum(axis=1)
    np.testing.assert_allclose(made.distances_N, 1 - cosine, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(made.centroids_KD, axis=1), 1, atol=1e-6)


def test_mean_cosine_is_that_of_all_pairs(data) -> None:
    made = kmeans(data.x[:500], KMeansConfig(k=5), seed=0)
    cosines = data.x[:500].astype(np.float64) @ data.x[:500].T
    pairs = cosines[~np.eye(500, dtype=bool)].mean()
    assert made.mean_cosine == pytest.approx(pairs, abs=1e-6)


def test_order_of_rows_changes_no_bit(data) -> None:
    config = KMeansConfig(k=20)
    order = np.random.default_rng(0).permutation(len(data.x))
    digests = {
        kmeans(data.x, config, 1, keys_N=data.keys).digest,
        kmeans(data.x[order], config, 1, keys_N=data.keys[order]).digest,
    }
    assert len(digests) == 1


def test_other_seeds_start_elsewhere(data) -> None:
    config = KMeansConfig(k=20, iterations=1)
    assert kmeans(data.x, config, 1).digest != kmeans(data.x, config, 2).digest


def test_warm_start_keeps_ids_and_halves_the_iterations(data) -> None:
    config = KMeansConfig(k=20, iterations=50, warm_iterations=50, init="random")
    cold = kmeans(data.x, config, seed=0)
    rng = np.random.default_rng(1)
    moved = data.x + rng.normal(size=data.x.shape).astype(np.float32) * 0.02
    warm = kmeans(moved, config, seed=7, warm=LabelTable(cold.keys_N, cold.labels_N))
    again = kmeans(moved, config, seed=7)
    assert (warm.labels_N == cold.labels_N).mean() >= 0.95
    assert warm.iterations <= 0.5 * again.iterations
    assert (again.labels_N == cold.labels_N).mean() < 0.5


def test_warm_labels_of_another_k_are_refused(data) -> None:
    table = LabelTable(np.arange(6000, dtype=np.uint64), np.arange(6000, dtype=np.int32) % 30)
    with pytest.raises(ClusteringError, match="warm labels go up to 29, k is 20"):
        kmeans(data.x, KMeansConfig(k=20), warm=table)


def test_balancing_evens_sizes_without_losing_the_classes(mixture) -> None:
    data = mixture(n=6000, k=20, width=48, noise=0.6, seed=5)
    plain = kmeans(data.x, KMeansConfig(k=30), seed=1)
    even = kmeans(data.x, KMeansConfig(k=30, balance="sinkhorn"), seed=1)
    full = KMeansConfig(k=30, balance="sinkhorn", balance_iterations=30)
    evenest = kmeans(data.x, full, seed=1)
    spread = [effective_clusters(made.counts_K) for made in (plain, even, evenest)]
    assert spread == sorted(spread)
    assert spread[2] > spread[0] + 0.5
    assert plain.counts_K.min() < even.counts_K.min()
    assert nmi(even.labels_N, data.truth) >= nmi(plain.labels_N, data.truth) - 0.02


def _agree(made: Clustering, truth: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Whether each row's label, by number, is its class."""
    return LabelTable(made.keys_N, made.labels_N).lookup(keys) == truth


def test_a_few_known_rows_name_the_clusters_and_keep_their_labels(mixture, many_shares) -> None:
    data = mixture(n=3000, k=12, noise=2.5)
    few = np.concatenate([np.flatnonzero(data.truth == c)[:2] for c in range(12)])
    order = np.argsort(data.keys[few])
    seeds = LabelTable(data.keys[few][order], data.truth[few][order].astype(np.int32))
    space = whole_rows(data.x.shape[1], spherical=True)
    config = KMeansConfig(k=12, warm_iterations=50, tol=0)
    runs = [
        cluster(many_shares(data.keys, data.x, n, seed=n), space, config, 0, seeds=seeds)
        for n in (1, 5)
    ]
    assert runs[0].digest == runs[1].digest
    made = runs[0]
    assert _agree(made, seeds.labels_N, seeds.keys_N).all()
    falls = np.diff(made.history)
    assert (falls <= 1e-9 * made.history[0]).all(), "what is minimised rose"
    found = _agree(made, data.truth, data.keys).mean()
    only_the_start = cluster(
        many_shares(data.keys, data.x, 1, seed=0),
        space,
        config.model_copy(update={"warm_iterations": 1}),
        0,
        warm=seeds,
    )
    unknown = cluster(many_shares(data.keys, data.x, 1, seed=0), space, config, 0)
    assert found > _agree(only_the_start, data.truth, data.keys).mean() + 0.05
    assert _agree(unknown, data.truth, data.keys).mean() < 0.5, "ids of clusters are no classes"


def test_heavy_seeds_hold_their_centroids_and_light_ones_let_them_go(mixture, many_shares) -> None:
    data = mixture(n=3000, k=12, noise=2.5)
    few = np.sort(np.concatenate([np.flatnonzero(data.truth == c)[:2] for c in range(12)]))
    few = few[np.argsort(data.keys[few])]
    seeds = LabelTable(data.keys[few], data.truth[few].astype(np.int32))
    means = np.stack([data.x[few][data.truth[few] == c].sum(0) for c in range(12)])
    nearest = (data.x @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(1)
    nearest[few] = data.truth[few]
    space = whole_rows(data.x.shape[1], spherical=True)
    equal = []
    for weight in (1, 10**6):
        config = KMeansConfig(k=12, seed_weight=weight)
        made = cluster(many_shares(data.keys, data.x, 1, 0), space, config, 0, seeds=seeds)
        equal.append(_agree(made, nearest, data.keys).mean())
    assert equal[1] > 0.999
    assert equal[0] < 0.9


def test_seeds_of_other_rows_are_refused(mixture, many_shares) -> None:
    data = mixture(n=200, k=4)
    seeds = LabelTable(np.array([7], np.uint64), np.array([1], np.int32))
    space = whole_rows(data.x.shape[1], spherical=True)
    with pytest.raises(ClusteringError, match="none of the 1 rows with a known label is among"):
        cluster(many_shares(data.keys, data.x, 1, 0), space, KMeansConfig(k=4), 0, seeds=seeds)


def test_sampling_fits_on_a_part_and_labels_all(data) -> None:
    config = KMeansConfig(k=20, max_points_per_centroid=64)
    made = kmeans(data.x, config, seed=0)
    everything = kmeans(data.x, KMeansConfig(k=20), seed=0)
    assert made.counts_K.sum() == len(data.x)
    assert made.history[0] < 0.3 * everything.history[0]
    assert made.inertia < 1.1 * everything.inertia


def test_empty_clusters_are_filled_or_kept_as_asked() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(300, 4)), rng.normal(size=(300, 4)) + 20]).astype("f")
    start = np.concatenate([x[:1], x[300:301], np.full((2, 4), -1000)]).astype(np.float32)
    options = {"k": 4, "spherical": False, "iterations": 20}
    filled = kmeans(x, KMeansConfig(**options), init_KD=start)
    kept = kmeans(x, KMeansConfig(**options, empty="keep"), init_KD=start)
    assert (filled.counts_K > 0).all()
    assert (kept.counts_K == [300, 300, 0, 0]).all()
    assert filled.inertia < kept.inertia


def test_one_cluster_is_the_mean() -> None:
    x = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    made = kmeans(x, KMeansConfig(k=1, spherical=False))
    np.testing.assert_allclose(made.centroids_KD[0], x.mean(axis=0), atol=1e-6)
    assert (made.labels_N == 0).all()


def test_as_many_clusters_as_rows_leaves_no_distance() -> None:
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    made = kmeans(x, KMeansConfig(k=40))
    assert (made.counts_K == 1).all()
    assert made.inertia == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_equal_rows_end_in_one_cluster(spherical: bool, init: str) -> None:
    x = np.tile(np.array([[0.6, 0.8, 0.0]], dtype=np.float32), (50, 1))
    made = kmeans(x, KMeansConfig(k=4, spherical=spherical, init=init))
    assert sorted(made.counts_K) == [0, 0, 0, 50]
    assert made.inertia == pytest.approx(0, abs=1e-6)
    assert np.isfinite(made.centroids_KD).all()


def _rows(n: int = 20) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32)


def test_fewer_rows_than_clusters_is_an_error() -> None:
    with pytest.raises(BadVectors, match="3 rows for k = 4 clusters"):
        kmeans(_rows(3), KMeansConfig(k=4))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("spherical", [True, False])
def test_values_that_are_no_numbers_are_named_by_key(value: float, spherical: bool) -> None:
    x = _rows()
    x[7, 2] = value
    with pytest.raises(BadVectors, match="NaN or infinite values: keys 7"):
        kmeans(x, KMeansConfig(k=4, spherical=spherical))


def test_rows_of_zeros_have_no_direction() -> None:
    x = _rows()
    x[[3, 5]] = 0
    with pytest.raises(BadVectors, match=r"only zeros.*keys 3, 5"):
        kmeans(x, KMeansConfig(k=4))
    assert kmeans(x, KMeansConfig(k=4, spherical=False)).counts_K.sum() == 20


def test_duplicate_keys_are_refused() -> None:
    keys = np.arange(20, dtype=np.uint64)
    keys[4] = 9
    with pytest.raises(BadVectors, match="1 keys occur more than once: 9"):
        kmeans(_rows(), KMeansConfig(k=4), keys_N=keys)


@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1e15])
def test_scale_of_euclidean_rows_changes_no_label(mixture, scale: float) -> None:
    data = mixture(n=500, k=6, noise=0.8)
    config = KMeansConfig(k=6, spherical=False)
    plain, scaled = kmeans(data.x, config), kmeans(data.x * np.float32(scale), config)
    assert (plain.labels_N == scaled.labels_N).all()


def test_every_start_that_a_config_may_name_is_there() -> None:
    assert set(STARTS) == set(get_args(Init))
