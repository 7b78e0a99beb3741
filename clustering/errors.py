"""ClusteringError and its kinds: what clustering raises on purpose.

Knows nothing of how they are shown. Invariant: each message names what was found, where, what was
expected and the next step; `exit_code` is what the `diccae` command returns.
"""

from collections.abc import Iterable
from typing import ClassVar


class ClusteringError(Exception):
    """A round or a clustering that cannot be made for a reason the user can act upon."""

    exit_code: ClassVar[int] = 1


class BadVectors(ClusteringError):
    """Rows that cannot be clustered: NaN, zero, duplicate keys, changing widths, too few."""

    keys: tuple[int, ...] = ()
    """Keys of the first bad rows, where they are known."""

    def of(self, keys: Iterable[int]) -> "BadVectors":
        """This error with the keys it is about."""
        self.keys = tuple(int(key) for key in keys)
        return self


class RoundTimeout(ClusteringError):
    """A round or a flush did not finish in the time allowed."""


class MissingLabels(ClusteringError):
    """Labels do not cover the frozen rows exactly; the round is withheld."""
