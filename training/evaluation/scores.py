"""How good scores [N, C] of clips over classes are: top-k, average precision, confusion.

Pure numpy on arrays: knows nothing of who scored (a classifier, a probe), of files or splits.
Invariant: equal scores never help; a classifier that gives every class the same score is right by
chance of order, not by luck of sort.

Shapes: N clips, C classes, L labels of the clip that has most.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

Scores = NDArray[np.floating]
Labels = NDArray[np.integer]
"""[N]; where said so also [N, L]: a clip's labels, the first one first, then -1."""


def topk_accuracy(scores_NC: Scores, labels_N: Labels, k: int = 1) -> float:
    """Share of clips of which a class is among the k highest scores; ties go to the lower class.

    Args: labels_N: or [N, L].
    Raises: ValueError for no clips, labels out of range or scores that are not finite.
    """
    _check(scores_NC, labels_N)
    return float((label_ranks(scores_NC, labels_N) < k).mean())


def label_ranks(scores_NC: Scores, labels_N: Labels) -> NDArray[np.int64]:
    """How many classes come before the best label of each row; of equal scores the lower class:
    [N]. Args: labels_N: or [N, L]."""
    best_N: NDArray[np.int64] = np.full(len(labels_N), scores_NC.shape[1])
    for own_N in _of_each(labels_N).T:
        own_N1 = scores_NC[np.arange(len(own_N)), own_N][:, None]
        before = np.arange(scores_NC.shape[1])[None] < own_N[:, None]
        rank_N = (scores_NC > own_N1).sum(1) + ((scores_NC == own_N1) & before).sum(1)
        best_N = np.where(own_N >= 0, np.minimum(best_N, rank_N), best_N)
    return best_N


def average_precisions(scores_NC: Scores, labels_N: Labels) -> NDArray[np.float64]:
    """Average precision of each class against all others, NaN for a class without clips: [C].

    Sum over distinct score thresholds of (recall gained) * precision, as scikit-learn defines it.

    Args: labels_N: or [N, L].
    """
    labels_NL = _check(scores_NC, labels_N)
    found = np.full(scores_NC.shape[1], np.nan)
    for index in np.unique(labels_NL[labels_NL >= 0]):
        scores = scores_NC[:, index]
        order = np.argsort(-scores, kind="stable")
        hits = np.cumsum((labels_NL[order] == index).any(1))
        last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
        hits = hits[last_of_tie]
        gained = np.diff(hits, prepend=0) / hits[-1]
        found[index] = float((gained * hits / (last_of_tie + 1)).sum())
    return found


def mean_average_precision(scores_NC: Scores, labels_N: Labels) -> float:
    """Mean of `average_precisions` over the classes that have clips."""
    return float(np.nanmean(average_precisions(scores_NC, labels_N)))


def taken_as(labels_NL: Labels, predictions_N: Labels) -> Labels:
    """The class each clip counts for in a confusion matrix, [N]: the predicted one if it is among
    the clip's, else the first of the clip's."""
    is_right_N = (labels_NL == predictions_N[:, None]).any(1)
    return np.where(is_right_N, predictions_N, labels_NL[:, 0])


def confusion_counts(labels_N: Labels, predictions_N: Labels, n_classes: int) -> NDArray[np.int64]:
    """How many clips of each class (rows) were taken for each class (columns): [C, C]."""
    for name, values in (("labels", labels_N), ("predictions", predictions_N)):
        if len(values) and not 0 <= values.min() <= values.max() < n_classes:
            raise ValueError(f"{name} outside 0..{n_classes - 1}: {values.min()}..{values.max()}")
    cells = labels_N.astype(np.int64) * n_classes + predictions_N
    return np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)


def class_accuracies(confusion_CC: NDArray[np.number]) -> NDArray[np.float64]:
    """Share of each class's clips that were recognised, NaN for a class without clips: [C]."""
    return np.diagonal(confusion_rates(confusion_CC)).copy()


class ConfusedPair(NamedTuple):
    """Two classes and how often one is taken for the other."""

    first: int
    second: int
    degree: float
    """`mutual_confusion` of the two, in [0, 1]."""


def most_confused_pairs(confusion_CC: NDArray[np.number], n_pairs: int) -> list[ConfusedPair]:
    """The pairs with the highest confusion, highest first; pairs never confused are left out.

    Args: confusion_CC: counts, or summed posteriors, of the classes that clips of each class (rows)
        were taken for.
    """
    degrees = np.triu(mutual_confusion(confusion_CC), k=1)
    order = np.argsort(-degrees, axis=None, kind="stable")[:n_pairs]
    firsts, seconds = np.unravel_index(order, degrees.shape)
    pairs = zip(firsts.tolist(), seconds.tolist(), strict=True)
    return [ConfusedPair(k, m, float(degrees[k, m])) for k, m in pairs if degrees[k, m] > 0]


def pair_accuracy(
    scores_NC: Scores, labels_N: Labels, pairs: Sequence[tuple[int, int] | ConfusedPair]
) -> float:
    """Mean over pairs of how often the right one of the two scores higher, on clips of the two.

    A tie is half right. Choose the pairs on other clips than these.

    Raises: ValueError if there is no pair, or one without clips.
    """
    _check(scores_NC, labels_N)
    found = []
    for first, second in ((pair[0], pair[1]) for pair in pairs):
        rows = np.flatnonzero((labels_N == first) | (labels_N == second))
        if not len(rows):
            raise ValueError(f"no clips of the pair {first}, {second}")
        margin = scores_NC[rows, first] - scores_NC[rows, second]
        margin = np.where(labels_N[rows] == first, margin, -margin)
        found.append(np.mean((margin > 0) + 0.5 * (margin == 0)))
    if not found:
        raise ValueError("pair accuracy needs at least one pair")
    return float(np.mean(found))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p: fair coins dividing the clips on which two models differ as unevenly."""
    n = only_a + only_b
    # Not scipy.stats, which takes longer to import than all of this to compute.
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), n, 0.5))) if n else 1.0


def confusion_rates(confusion_CC: NDArray[np.number]) -> NDArray[np.float64]:
    """Each row over its sum, NaN for a class without clips: [C, C]."""
    clips_C1 = confusion_CC.sum(1, keepdims=True)
    rates = np.full(confusion_CC.shape, np.nan)
    np.divide(confusion_CC, clips_C1, out=rates, where=clips_C1 > 0)
    return rates


def mutual_confusion(confusion_CC: NDArray[np.number]) -> NDArray[np.float64]:
    """How much two classes are taken for each other, the mean of both directions' rates: [C, C].

    Symmetric, in [0, 1]. A class without clips is taken for nothing; on the diagonal is the share
    of a class's clips that were recognised.
    """
    rates_CC = np.nan_to_num(confusion_rates(confusion_CC))
    mutual_CC: NDArray[np.float64] = (rates_CC + rates_CC.T) / 2
    return mutual_CC


def _of_each(labels_N: Labels) -> Labels:
    """[N] or [N, L] as [N, L]."""
    return labels_N[:, None] if labels_N.ndim == 1 else labels_N


def _check(scores_NC: Scores, labels_N: Labels) -> Labels:
    """Returns: the labels as [N, L]."""
    if scores_NC.ndim != 2 or len(scores_NC) != len(labels_N) or not len(labels_N):
        raise ValueError(f"scores {scores_NC.shape} for labels {labels_N.shape}: need [N, C], [N]")
    if not np.isfinite(scores_NC).all():
        bad = int((~np.isfinite(scores_NC).all(1)).sum())
        raise ValueError(f"scores of {bad} of {len(scores_NC)} clips are not finite")
    labels_NL = _of_each(labels_N)
    lowest, highest = labels_NL[:, 0].min(), labels_NL.max()
    if not 0 <= lowest <= highest < scores_NC.shape[1]:
        raise ValueError(f"labels {lowest}..{highest} for {scores_NC.shape[1]} classes")
    return labels_NL
