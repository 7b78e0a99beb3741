"""Which classes are taken for which: an order that shows groups, and the worst pairs.

The order is that of a tree (average linkage on mutual confusion): classes that are taken for each
other must stand side by side to be seen as a group. Single linkage chains everything to everything
through one odd clip; an order by accuracy or by name scatters the groups.
Pure numpy and scipy. Knows nothing of frames or HTML.
Invariant: a pair is counted once, and by the rate that results.json ranks pairs by.

Shapes: C classes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform

from training.evaluation.scores import most_confused_pairs, mutual_confusion

_MAX_OPTIMAL = 400  # optimal leaf ordering costs C^3
_CUT = 0.97
"""Two groups stay apart if the mean rate of confusion between them is below 1 - this."""


class Order(NamedTuple):
    """Classes side by side with those they are confused with."""

    positions: list[int]
    """Class indices in the order to show."""
    boundaries: list[int]
    """Positions at which another group of classes begins, 0 left out."""


def group_classes(counts_CC: NDArray[np.int64]) -> Order:
    """Order classes by average-linkage clustering of their mutual confusion."""
    n_classes = len(counts_CC)
    if n_classes < 3:
        return Order(list(range(n_classes)), [])
    distance = 1.0 - mutual_confusion(counts_CC)
    np.fill_diagonal(distance, 0.0)
    tree = linkage(
        squareform(distance, checks=False), "average", optimal_ordering=n_classes <= _MAX_OPTIMAL
    )
    leaves = leaves_list(tree)
    groups = fcluster(tree, _CUT, "distance")[leaves]
    boundaries = [at for at in range(1, n_classes) if groups[at] != groups[at - 1]]
    return Order([int(leaf) for leaf in leaves], boundaries)


class Pair(NamedTuple):
    """Two classes that are taken for each other."""

    a: int
    b: int
    a_as_b: int
    b_as_a: int
    n_a: int
    n_b: int

    @property
    def rate(self) -> float:
        """Mean over both classes of the share of its clips that went to the other."""
        right_a, right_b = self.n_a - self.a_as_b, self.n_b - self.b_as_a
        counts_22 = np.array([[right_a, self.a_as_b], [self.b_as_a, right_b]])
        return float(mutual_confusion(counts_22)[0, 1])


def worst_pairs(counts_CC: NDArray[np.int64], most: int) -> list[Pair]:
    """The pairs with the highest rate, worst first; only pairs with an error at all."""
    return [pair_of(counts_CC, p.first, p.second) for p in most_confused_pairs(counts_CC, most)]


def pair_of(counts_CC: NDArray[np.int64], a: int, b: int) -> Pair:
    """The confusion of classes `a` and `b`."""
    totals = counts_CC.sum(axis=1)
    return Pair(a, b, int(counts_CC[a, b]), int(counts_CC[b, a]), int(totals[a]), int(totals[b]))


def accuracy(counts_CC: NDArray[np.int64]) -> float:
    """Share of clips on the diagonal."""
    return float(np.trace(counts_CC) / max(counts_CC.sum(), 1))
