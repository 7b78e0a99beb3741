"""Paired differences: what two variants differ by, seed by seed, with its interval.

Pure: knows nothing of models or of what was measured. Invariant: two variants are compared seed by
seed, never by their means alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from training.evaluation.variants import CONTRASTS


class Spread(NamedTuple):
    """Values of one variant over seeds."""

    n: int
    mean: float
    sd: float
    """With n - 1; NaN for one seed."""


class PairedDifference(NamedTuple):
    """One variant minus another over the seeds both have."""

    variant: str
    reference: str
    tells: str
    n: int
    mean: float
    sd: float
    """Of the differences, with n - 1; NaN for one seed."""
    low: float
    high: float
    """95 % interval of the mean by Student's t; NaN for one seed."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


Values = Mapping[str, Mapping[int, float]]
"""A metric by variant and seed."""


def spread(by_seed: Mapping[int, float]) -> Spread:
    """Mean and standard deviation. Raises: ValueError without a seed."""
    if not by_seed:
        raise ValueError("no seed to take the mean of")
    x = np.array(list(by_seed.values()), np.float64)
    return Spread(len(x), float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else math.nan)


def paired_difference(
    values: Values, variant: str, reference: str, tells: str = "", confidence: float = 0.95
) -> PairedDifference | None:
    """The difference seed by seed; None if no seed has both.

    Student's t on the differences: seeds share weights at the branch, batches and views, so most of
    what varies between seeds is not in it.
    """
    from scipy.stats import t as student

    seeds = sorted(values.get(variant, {}).keys() & values.get(reference, {}).keys())
    if not seeds:
        return None
    x = np.array([values[variant][s] - values[reference][s] for s in seeds], np.float64)
    n, mean = len(x), float(x.mean())
    if n == 1:
        unknown = math.nan
        return PairedDifference(
            variant, reference, tells, n=1, mean=mean, sd=unknown, low=unknown, high=unknown
        )
    sd = float(x.std(ddof=1))
    half = float(student.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return PairedDifference(variant, reference, tells, n, mean, sd, mean - half, mean + half)


def contrasts(values: Values, own: Sequence[str] = ()) -> list[PairedDifference]:
    """The contrasts that the variants at hand allow.

    Args: own: variants of the user's, and points of a sweep: against `full` and `instance`.
    """
    wanted = [*CONTRASTS]
    wanted += [(name, reference, "") for name in own for reference in ("full", "instance")]
    found = (paired_difference(values, *names) for names in wanted)
    return [difference for difference in found if difference is not None]
