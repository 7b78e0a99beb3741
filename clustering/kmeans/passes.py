"""Passes: what k-means asks of all rows at once, whoever holds them.

Knows nothing of Ray: pool.compute spreads the same passes over actors. Invariant: a sum does not
depend on the number of shares or on the order in which their parts arrive.

Shapes: N rows, D width of a point, K clusters, P width of a stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, TypeVarTuple

import numpy as np

from clustering.kmeans.label_table import LabelTable
from clustering.kmeans.share import LabelledPoints, Moments, PointRule, Share, Sums
from clustering.kmeans.space import PointSpace

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


def merge(parts: Iterable[Sums]) -> Sums:
    """Partial sums added as they come; the parts, at least one, are left as they are.

    The order does not matter, because all terms lie on a grid (kmeans.exact).
    """
    arriving = iter(parts)
    first = next(arriving)
    total = Sums(first.sums.copy(), first.counts.copy())
    for part in arriving:
        np.add(total.sums, part.sums, out=total.sums)
        np.add(total.counts, part.counts, out=total.counts)
    return total


class Passes(ABC):
    """The methods of `Share` over all shares.

    A method is handed over unbound: its name says which to people, to mypy and to an actor.
    """

    @abstractmethod
    def gather(
        self, method: Callable[[Share, *Arguments], Result], *args: *Arguments
    ) -> list[Result]:
        """The result of a `Share` method from every share, in the order of the shares."""

    def reduce(self, method: Callable[[Share, *Arguments], Sums], *args: *Arguments) -> Sums:
        """The sum of a `Share` method's results."""
        return merge(self.gather(method, *args))

    def share_out(self, value: Any) -> Any:
        """Put a large argument where all shares can read it; a no-op in one process."""
        return value

    def moments(self, space: PointSpace) -> Moments:
        """As `Share.moments`."""
        found = self.gather(Share.moments, space)
        return Moments(sum(m.n_rows for m in found), max(m.max_abs for m in found))

    def totals(self, rule: PointRule, square_exponent: int) -> tuple[np.ndarray, float]:
        """Sum of the points, float64 [D], and of their squared lengths."""
        total = self.reduce(Share.totals, rule, square_exponent)
        return total.sums, int(total.counts[0]) * 2.0**square_exponent

    def keys(self) -> np.ndarray:
        """Keys of all rows, uint64, sorted."""
        return np.sort(np.concatenate(self.gather(Share.keys)))

    def nth_hash(self, seed: int, n: int) -> int:
        """The n-th smallest hash of all keys."""
        hashes = np.concatenate(self.gather(Share.smallest_hashes, seed, n))
        return int(np.partition(hashes, n - 1)[n - 1])

    def points_below(self, rule: PointRule, seed: int, below: int) -> np.ndarray:
        """Points whose hash is at most `below`, in the order of the hash."""
        found = self.gather(Share.points_below, rule, seed, below)
        order = np.argsort(np.concatenate([part.hashes for part in found]))
        return np.concatenate([part.points for part in found])[order]

    def lloyd_sums(
        self, rule: PointRule, centroids_KD: np.ndarray, offset_K: np.ndarray | None
    ) -> Sums:
        """As `Share.lloyd_sums`."""
        return self.reduce(Share.lloyd_sums, rule, self.share_out(centroids_KD), offset_K)

    def label_sums(self, rule: PointRule, table: LabelTable, k: int) -> Sums:
        """As `Share.label_sums`; `table` may be what `share_out` returned."""
        return self.reduce(Share.label_sums, rule, table, k)

    def balance_mass(
        self, rule: PointRule, centroids_KD: np.ndarray, offset_K: np.ndarray, epsilon: float
    ) -> np.ndarray:
        """As `Share.balance_mass`; `centroids_KD` may be what `share_out` returned."""
        return self.reduce(Share.balance_mass, rule, centroids_KD, offset_K, epsilon).sums

    def label(
        self, rule: PointRule, centroids_KD: np.ndarray, offset_K: np.ndarray | None
    ) -> LabelledPoints:
        """As `Share.label`, sorted by key."""
        found = self.gather(Share.label, rule, self.share_out(centroids_KD), offset_K)
        keys, labels, squared = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(keys, kind="stable")
        return LabelledPoints(keys[order], labels[order], squared[order])

    def posterior_sums(
        self,
        rule: PointRule,
        prototypes: tuple[tuple[int, np.ndarray], ...],
        temperature: float,
        table: LabelTable,
    ) -> np.ndarray:
        """As `Share.posterior_sums`; `table` may be what `share_out` returned."""
        return self.reduce(Share.posterior_sums, rule, prototypes, temperature, table).sums


class LocalPasses(Passes):
    """All rows in this process, in one share."""

    def __init__(self, share: Share) -> None:
        self._share = share

    def gather(
        self, method: Callable[[Share, *Arguments], Result], *args: *Arguments
    ) -> list[Result]:
        """One result."""
        return [method(self._share, *args)]
