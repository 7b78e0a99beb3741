"""Health of a round: measures of its labels, and the collapse guard that withholds them.

Pure numpy and scipy: knows nothing of how labels were made. Invariant: no measure changes when
cluster ids are permuted.

Shapes: N rows, K clusters.
"""

from collections.abc import Mapping

import numpy as np
from scipy.sparse import coo_matrix

from clustering.config import GuardConfig
from clustering.kmeans.label_table import LabelTable


def agreement(labels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How well labels match known classes, each in 0..1: nmi, purity, hungarian_accuracy.

    Args: integer arrays [N]; rows with a negative label or class are left out. Without rows all
        three are 0.
    """
    # Takes longer to import than all else that an actor of this package needs.
    from scipy.optimize import linear_sum_assignment

    known = (labels >= 0) & (truth >= 0)
    if not known.any():
        return {"nmi": 0.0, "purity": 0.0, "hungarian_accuracy": 0.0}
    table = _contingency(labels[known], truth[known])
    n = table.sum()
    dense = table.toarray()
    rows, columns = linear_sum_assignment(dense, maximize=True)
    return {
        "nmi": _nmi(table),
        "purity": float(dense.max(axis=1).sum() / n),
        "hungarian_accuracy": float(dense[rows, columns].sum() / n),
    }


def nmi(labels: np.ndarray, others: np.ndarray) -> float:
    """Normalised mutual information (arithmetic mean of the entropies) of two labellings.

    Two labellings that each put all rows in one cluster agree fully: 1. No rows: 0.
    """
    return _nmi(_contingency(labels, others)) if len(labels) else 0.0


def _contingency(labels: np.ndarray, others: np.ndarray) -> coo_matrix:
    _, a = np.unique(labels, return_inverse=True)
    _, b = np.unique(others, return_inverse=True)
    table = coo_matrix((np.ones(len(a)), (a, b)), shape=(a.max() + 1, b.max() + 1))
    table.sum_duplicates()
    return table


def _nmi(table: coo_matrix) -> float:
    n = table.data.sum()
    row_p = np.asarray(table.sum(axis=1)).ravel() / n
    column_p = np.asarray(table.sum(axis=0)).ravel() / n
    joint = table.data / n
    information = float((joint * np.log(joint / (row_p[table.row] * column_p[table.col]))).sum())
    mean_entropy = (_entropy(row_p) + _entropy(column_p)) / 2
    return min(1.0, max(0.0, information / mean_entropy)) if mean_entropy > 0 else 1.0


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def churn(table: LabelTable, before: LabelTable | None) -> float:
    """1 - NMI with the round before, over the keys both know; 0 for the first round."""
    if before is None:
        return 0.0
    old_N = before.lookup(table.keys_N)
    common = old_N >= 0
    return 1.0 - nmi(table.labels_N[common], old_N[common])


def effective_clusters(counts_K: np.ndarray) -> float:
    """exp(entropy of the sizes): K for equal sizes, 1 when one cluster holds all."""
    total = counts_K.sum()
    return float(np.exp(_entropy(counts_K / total))) if total else 0.0


def withheld_because(health: Mapping[str, float], k: int, guard: GuardConfig) -> str:
    """Why a round must not be published, or an empty string."""
    reasons = []
    if health["effective_clusters"] < guard.min_effective_frac * k:
        reasons.append(
            f"{health['effective_clusters']:.1f} effective clusters of {k} "
            f"(guard.min_effective_frac = {guard.min_effective_frac})"
        )
    if health["mean_cosine"] > guard.max_mean_cosine:
        reasons.append(
            f"mean cosine {health['mean_cosine']:.3f} "
            f"(guard.max_mean_cosine = {guard.max_mean_cosine})"
        )
    if health["churn"] > guard.max_churn:
        reasons.append(f"churn {health['churn']:.3f} (guard.max_churn = {guard.max_churn})")
    if health["coverage"] < guard.min_coverage:
        reasons.append(
            f"coverage {health['coverage']:.3f} (guard.min_coverage = {guard.min_coverage})"
        )
    return "collapse guard: " + "; ".join(reasons) if reasons else ""


_WORST = {
    **dict.fromkeys(("n_empty", "size_max", "churn", "mean_cosine", "iterations"), max),
    **dict.fromkeys(("size_min", "effective_clusters"), min),
}


def merge_health(heads: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Health of a round from that of its heads: the worst of each, the mean inertia."""
    merged: dict[str, float] = {}
    for key in next(iter(heads.values())):
        values = [health[key] for health in heads.values()]
        merged[key] = _WORST[key](values) if key in _WORST else float(np.mean(values))
    if len(heads) > 1:
        for name, health in heads.items():
            merged.update({f"{name}/{key}": value for key, value in health.items()})
    return merged
