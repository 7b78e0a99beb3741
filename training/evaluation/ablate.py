"""What each part of DICCAE is worth: variants of a recipe, and statistics of their differences.

Pure: knows nothing of how a variant is trained. Invariants: two variants are compared seed by seed,
never by their means alone; a variant that shares the warm-up differs from the recipe in nothing
that acts before the first labels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_ACTS_AFTER_LABELS = (
    "clustering.",
    "confusion.",
    "loss.class_alignment",
    "loss.class_temperature",
    "loss.confusion",
    "loss.fusion",
    "rounds.cold_every",
    "rounds.labels",
)
"""Config keys that change nothing before the first labels."""


class Variant(NamedTuple):
    """One way to train."""

    question: str
    """What it is compared for, in a few words."""
    changes: dict[str, dict[str, Any]]
    """Config values that differ from the recipe, by section and key."""

    @property
    def shares_warmup(self) -> bool:
        """Whether the recipe's first epochs are this variant's, too."""
        return all(key.startswith(_ACTS_AFTER_LABELS) for key in dotted(self.changes))


VARIANTS: dict[str, Variant] = {
    "instance": Variant("InfoNCE alone, no labels", {"rounds": {"labels": "none"}}),
    "pseudo_labels": Variant(
        "+ own-stream cross-entropy on pseudo-labels",
        {"loss": {"class_alignment": 0.0}, "confusion": {"gamma": 0.0}},
    ),
    "alignment": Variant("+ class-level alignment only (L_cls)", {"loss": {"confusion": 0.0}}),
    "gamma0": Variant("both, confusion weights off", {"confusion": {"gamma": 0.0}}),
    "static": Variant("confusion of each round's start", {"confusion": {"update": "static"}}),
    "full": Variant("DICCAE", {}),
    "no_fusion": Variant("DICCAE without the fusion stream", {"loss": {"fusion": False}}),
    "random_labels": Variant("control: labels by chance", {"rounds": {"labels": "random"}}),
    "true_labels": Variant("control: the true classes", {"rounds": {"labels": "true"}}),
    "cavmae": Variant(
        "CAV-MAE's losses",
        {
            "loss": {
                "reconstruction": 1.0,
                "instance": 0.01,
                "instance_on": "z",
                "instance_direction": "v2a",
                "negatives": "local",
                "intra": 0.0,
                "class_alignment": 0.0,
                "confusion": 0.0,
            },
            "rounds": {"labels": "none"},
        },
    ),
}

DEFAULT_VARIANTS = tuple(name for name in VARIANTS if name != "cavmae")
"""`cavmae` needs a patch stem and trains its own warm-up."""

CONTRASTS: tuple[tuple[str, str, str], ...] = (
    ("full", "instance", "DICCAE against InfoNCE alone"),
    ("full", "random_labels", "pseudo-labels against labels by chance"),
    ("gamma0", "instance", "labels and alignment, without confusion weights"),
    ("gamma0", "pseudo_labels", "class-level alignment"),
    ("gamma0", "alignment", "own-stream cross-entropy"),
    ("full", "gamma0", "confusion weights"),
    ("full", "static", "dynamic against static confusion"),
    ("full", "no_fusion", "fusion stream"),
    ("true_labels", "full", "what perfect labels would add"),
    ("full", "cavmae", "DICCAE against CAV-MAE's losses"),
)
"""(variant, compared with, what the difference tells)."""


def dotted(changes: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of nested sections, as `section.key`."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


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
        return PairedDifference(variant, reference, tells, n, mean, *[math.nan] * 3)
    sd = float(x.std(ddof=1))
    half = float(student.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return PairedDifference(variant, reference, tells, n, mean, sd, mean - half, mean + half)


def contrasts(values: Values, own: Sequence[str] = ()) -> list[PairedDifference]:
    """The contrasts that the variants at hand allow; a variant of the user's own against `full`."""
    wanted = [*CONTRASTS, *((name, "full", "") for name in own)]
    found = (paired_difference(values, *names) for names in wanted)
    return [difference for difference in found if difference is not None]
