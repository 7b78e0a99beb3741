"""Given: labels that a round did not find: it publishes them, or clusters the other rows from them.

Knows nothing of where they come from (true classes, chance). Invariant: prototypes, confusion,
guard and publishing treat them as they treat a clustering, so that the labels are all that differs.

Shapes: N rows, K clusters.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from clustering.config import KMeansConfig
from clustering.errors import ClusteringError
from clustering.kmeans.fit_plan import plan_fit
from clustering.kmeans.label_table import LabelTable
from clustering.kmeans.lloyd import inertia_of, mean_cosine
from clustering.kmeans.passes import Passes
from clustering.kmeans.space import PointSpace, unit_rows


class Given(NamedTuple):
    """Labels in 0..K-1 of some rows."""

    table: LabelTable
    seeds: bool = False
    """Whether the other rows are clustered from them (`kmeans.lloyd.cluster`); else these have no
    label."""


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


def check_given(given: Given, k: int) -> Given:
    """Sorted by key. Raises: ClusteringError for labels outside 0..K-1."""
    keys_N, labels_N = given.table
    keys_N, labels_N = np.asarray(keys_N, np.uint64), np.asarray(labels_N, np.int32)
    outside = labels_N[(labels_N < 0) | (labels_N >= k)]
    if len(outside):
        raise ClusteringError(
            f"given labels: found {outside[0]}, allowed are 0 to {k - 1} (k = {k}). Leave out the "
            "rows without a label."
        )
    order = np.argsort(keys_N)
    return given._replace(table=LabelTable(keys_N[order], labels_N[order]))


def digest(given: Given) -> str:
    """SHA-256 of labels and of what they are for."""
    parts = [np.ascontiguousarray(a).tobytes() for a in given.table]
    return hashlib.sha256(b"".join([*parts, b"seeds" if given.seeds else b""])).hexdigest()


def label_as_given(
    passes: Passes, space: PointSpace, config: KMeansConfig, seed: int, table: LabelTable
) -> GivenLabels:
    """The given labels of the rows there are, measured as a clustering in `space` is.

    Raises: BadVectors for rows that cannot be clustered.
    """
    plan = plan_fit(passes, space, config, seed)
    keys_N = passes.keys()
    labels_N = table.lookup(keys_N)
    known = labels_N >= 0
    found = LabelTable(keys_N[known], labels_N[known])
    everything = plan.rule.everything()
    sums_KD, counts_K = passes.label_sums(everything, passes.share_out(found), config.k)
    total_D, sum_of_squares = plan.total_D, plan.sum_of_squares
    if everything != plan.rule:
        total_D, sum_of_squares = passes.totals(everything, plan.square_exponent)
    centroids_KD = sums_KD / np.maximum(counts_K, 1)[:, None]
    if space.spherical:
        centroids_KD = unit_rows(centroids_KD)
    return GivenLabels(
        keys_N=found.keys_N,
        labels_N=found.labels_N,
        counts_K=counts_K,
        inertia=inertia_of(
            sums_KD, counts_K, centroids_KD, sum_of_squares * known.sum() / plan.n_rows
        ),
        mean_cosine=mean_cosine(total_D, sum_of_squares, plan.n_rows),
    )
