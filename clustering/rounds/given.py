"""Labels that are given instead of found: the controls of an experiment.

Knows nothing of where they come from (true classes, chance). Invariant: prototypes, confusion,
guard and publishing treat them as they treat a clustering, so that the labels are all that differs.

Shapes: N rows, K clusters.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from clustering.config import ClusteringConfig
from clustering.errors import ClusteringError
from clustering.kmeans.grid import prepare
from clustering.kmeans.label_table import lookup
from clustering.kmeans.lloyd import inertia_of, mean_cosine
from clustering.kmeans.passes import Passes, Table
from clustering.kmeans.views import View


class GivenLabels(NamedTuple):
    """What a round needs to know of a labelling that no iteration made."""

    keys_N: np.ndarray
    """uint64, sorted: the rows that have a label."""
    labels_N: np.ndarray
    """int32 in 0..K-1."""
    counts_K: np.ndarray
    """int64."""
    inertia: float
    """Sum of squared distances to the mean of the label; a row without a label counts as an
    average one."""
    mean_cosine: float
    iterations: int = 0


def check_given(table: Table, k: int) -> Table:
    """Sorted by key. Raises: ClusteringError for labels outside 0..K-1."""
    keys_N, labels_N = np.asarray(table[0], np.uint64), np.asarray(table[1], np.int32)
    outside = labels_N[(labels_N < 0) | (labels_N >= k)]
    if len(outside):
        raise ClusteringError(
            f"given labels: found {outside[0]}, allowed are 0 to {k - 1} (k = {k}). Leave out the "
            "rows without a label."
        )
    order = np.argsort(keys_N)
    return keys_N[order], labels_N[order]


def digest(table: Table) -> str:
    """SHA-256 of a labelling."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in table)).hexdigest()


def label_as_given(
    passes: Passes, view: View, config: ClusteringConfig, seed: int, table: Table
) -> GivenLabels:
    """The given labels of the rows there are, measured as a clustering of `view` is.

    Raises: BadVectors for rows that cannot be clustered.
    """
    prepared = prepare(passes, view, config, seed)
    everything = prepared.fit.everything()
    keys_N = passes.keys()
    labels_N = lookup(*table, keys_N)
    known = labels_N >= 0
    keys_N, labels_N = keys_N[known], labels_N[known]
    sums_KD, counts_K = passes.label_sums(
        everything, passes.share_out((keys_N, labels_N)), config.k
    )
    sum_of_squares = prepared.sum_of_squares * known.sum() / prepared.n_rows
    centroids_KD = sums_KD / np.maximum(counts_K, 1)[:, None]
    if view.spherical:
        length = np.linalg.norm(centroids_KD, axis=1, keepdims=True)
        centroids_KD /= np.where(length > 0, length, 1.0)
    return GivenLabels(
        keys_N,
        labels_N,
        counts_K,
        inertia_of(sums_KD, counts_K, centroids_KD, sum_of_squares),
        mean_cosine(prepared.total_D, prepared.sum_of_squares, prepared.n_fit),
    )
