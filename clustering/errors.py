"""The errors clustering raises on purpose.

Knows nothing of how they are shown. Invariant: each message names what was found, where, what was
expected and the next step; `exit_code` is what the `diccae` command returns.
"""

from typing import ClassVar


class ClusteringError(Exception):
    """A round or a clustering that cannot be made for a reason the user can act upon."""

    exit_code: ClassVar[int] = 1


class BadVectors(ClusteringError):
    """Rows that cannot be clustered: NaN, zero, duplicate keys, changing widths, too few."""


class RoundTimeout(ClusteringError):
    """A round or a flush did not finish in the time allowed."""


class MissingLabels(ClusteringError):
    """Labels do not cover the frozen rows exactly; the round is withheld."""
