"""Who holds the rows, and in which order sums arrive, changes no bit."""

import numpy as np
import pytest

from clustering.config import KMeansConfig
from clustering.kmeans.lloyd import cluster
from clustering.kmeans.space import whole_rows

CONFIGS = {
    "spherical": {},
    "euclidean": {"spherical": False},
    "kmeans++": {"init": "kmeans++"},
    "balanced": {"balance": "sinkhorn"},
    "sampled": {"max_points_per_centroid": 40},
}


def _digest(shares, config: KMeansConfig, width: int) -> str:
    return cluster(shares, whole_rows(width, config.spherical), config, seed=4).digest


@pytest.mark.parametrize("name", CONFIGS)
def test_any_number_of_shares_and_any_order_give_the_same_bits(
    mixture, many_shares, name: str
) -> None:
    data = mixture(n=4000, k=12, noise=1.2)
    config = KMeansConfig(k=16, tol=0, **CONFIGS[name])
    digests = {
        _digest(many_shares(data.keys, 3.7 * data.x, count, seed), config, data.x.shape[1])
        for count, seed in [(1, 0), (2, 1), (3, 2), (5, 3), (16, 4)]
    }
    assert len(digests) == 1


def test_control_float32_sums_give_other_bits(mixture, many_shares) -> None:
    data = mixture(n=4000, k=12, noise=1.2)
    config = KMeansConfig(k=16, tol=0)
    digests = {
        _digest(many_shares(data.keys, data.x, count, seed, np.float32), config, data.x.shape[1])
        for count, seed in [(1, 0), (2, 1), (3, 2), (5, 3), (16, 4)]
    }
    assert len(digests) > 1


def test_an_empty_share_changes_nothing(mixture, many_shares) -> None:
    data = mixture(n=4000, k=12)
    even = data.keys - data.keys % np.uint64(16) + np.uint64(2) * (data.keys % np.uint64(8))
    keep = np.unique(even, return_index=True)[1]
    config = KMeansConfig(k=16, tol=0)
    digests = {
        _digest(many_shares(even[keep], data.x[keep], count, 0), config, data.x.shape[1])
        for count in (1, 16)
    }
    assert len(digests) == 1
