"""The passes of k-means over all rows, whoever holds them.

Knows nothing of Ray: pool.compute spreads the same passes over actors. Invariant: a sum does not
depend on the number of shares or on the order in which their parts arrive.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from clustering.kmeans.share import Moments, Preparation, Share
from clustering.kmeans.views import View

Sums = tuple[np.ndarray, ...]
Table = tuple[np.ndarray, np.ndarray]
"""Sorted keys uint64 and their labels int32."""


def merge(parts: list[Sums]) -> Sums:
    """Partial sums added; the parts are left as they are."""
    merged = tuple(array.copy() for array in parts[0])
    for part in parts[1:]:
        for total, array in zip(merged, part, strict=True):
            total += array
    return merged


class Passes(ABC):
    """Methods of `Share` over all shares."""

    @abstractmethod
    def gather(self, method: str, *args: Any) -> list[Any]:
        """The result of a `Share` method from every share, in the order of the shares."""

    @abstractmethod
    def reduce(self, method: str, *args: Any) -> Sums:
        """The sum of a `Share` method's results."""

    def share_out(self, value: Any) -> Any:
        """Put a large argument where all shares can read it; a no-op in one process."""
        return value

    def moments(self, view: View) -> Moments:
        """As `Share.moments`."""
        found: list[Moments] = self.gather("moments", view)
        return Moments(sum(m.n_rows for m in found), max(m.max_abs for m in found))

    def totals(self, prep: Preparation, square_exponent: int) -> tuple[np.ndarray, int]:
        """As `Share.totals`."""
        total_D, squares = self.reduce("totals", prep, square_exponent)
        return total_D, int(squares[0])

    def keys(self) -> np.ndarray:
        """Keys of all rows, uint64, sorted."""
        return np.sort(np.concatenate(self.gather("keys")))

    def nth_hash(self, seed: int, n: int) -> int:
        """The n-th smallest hash of all keys."""
        hashes = np.concatenate(self.gather("smallest_hashes", seed, n))
        return int(np.partition(hashes, n - 1)[n - 1])

    def points_below(self, prep: Preparation, seed: int, below: int) -> np.ndarray:
        """Points whose hash is at most `below`, in the order of the hash."""
        found = self.gather("points_below", prep, seed, below)
        hashes = np.concatenate([part[0] for part in found])
        return np.concatenate([part[1] for part in found])[np.argsort(hashes)]

    def lloyd_sums(
        self, prep: Preparation, centroids_KD: np.ndarray, offset_K: np.ndarray | None
    ) -> Sums:
        """As `Share.lloyd_sums`."""
        return self.reduce("lloyd_sums", prep, self.share_out(centroids_KD), offset_K)

    def label_sums(self, prep: Preparation, table: Table, k: int) -> Sums:
        """As `Share.label_sums`; `table` may be what `share_out` returned."""
        return self.reduce("label_sums", prep, table, k)

    def balance_mass(
        self, prep: Preparation, centroids_KD: np.ndarray, offset_K: np.ndarray, epsilon: float
    ) -> np.ndarray:
        """As `Share.balance_mass`; `centroids_KD` may be what `share_out` returned."""
        return self.reduce("balance_mass", prep, centroids_KD, offset_K, epsilon)[0]

    def label(
        self, prep: Preparation, centroids_KD: np.ndarray, offset_K: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Share.label`, sorted by key."""
        found = self.gather("label", prep, self.share_out(centroids_KD), offset_K)
        keys, labels, distances = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(keys, kind="stable")
        return keys[order], labels[order], distances[order]

    def posterior_sums(
        self,
        prep: Preparation,
        prototypes: tuple[tuple[int, np.ndarray], ...],
        temperature: float,
        table: Table,
    ) -> np.ndarray:
        """As `Share.posterior_sums`."""
        return self.reduce("posterior_sums", prep, prototypes, temperature, table)[0]


class LocalPasses(Passes):
    """All rows in this process, one share."""

    def __init__(self, share: Share) -> None:
        self._share = share

    def gather(self, method: str, *args: Any) -> list[Any]:
        """One result."""
        return [getattr(self._share, method)(*args)]

    def reduce(self, method: str, *args: Any) -> Sums:
        """The share's own sum."""
        return getattr(self._share, method)(*args)
