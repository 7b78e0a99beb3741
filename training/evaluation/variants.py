"""VARIANTS, the ways to train that an ablation compares, and the CONTRASTS drawn between them.

Pure tables: knows nothing of how a variant is trained or of what it scores. Invariant: a variant
that shares the warm-up differs from the recipe in nothing that acts before the first labels.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from training.losses.objective import settings_after_labels

_SECTIONS_AFTER_LABELS = (
    "clustering.",
    "confusion.",
    "rounds.cold_every",
    "rounds.label_noise",
    "rounds.labels",
)
"""Config that changes nothing before the first labels, beside that of loss terms."""


class Variant(NamedTuple):
    """One way to train."""

    question: str
    """What it is compared for, in a few words."""
    changes: dict[str, dict[str, Any]]
    """Config values that differ from the recipe, by section and key."""
    dose: tuple[str, str, str] | None = None
    """Of a point of a sweep: the variant that is swept, the key and its value."""

    @property
    def shares_warmup(self) -> bool:
        """Whether the recipe's first epochs are this variant's, too."""
        terms = {f"loss.{name}" for name in settings_after_labels()}
        return all(
            key in terms or key.startswith(_SECTIONS_AFTER_LABELS) for key in dotted(self.changes)
        )


VARIANTS: dict[str, Variant] = {
    "instance": Variant("InfoNCE alone, no labels", {"rounds": {"labels": "none"}}),
    "pseudo_labels": Variant(
        "+ own-stream cross-entropy on pseudo-labels",
        {"loss": {"class_alignment": 0.0}, "confusion": {"gamma": 0.0}},
    ),
    "alignment": Variant("+ class-level alignment only (L_cls)", {"loss": {"confusion": 0.0}}),
    "gamma0": Variant("both, confusion weights off", {"confusion": {"gamma": 0.0}}),
    "static": Variant("confusion of each round's start", {"confusion": {"update": "static"}}),
    "shuffled": Variant(
        "control: weights of pairs dealt out by chance", {"confusion": {"weights": "shuffled"}}
    ),
    "constant": Variant(
        "control: one weight for all pairs of a class", {"confusion": {"weights": "constant"}}
    ),
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
"""`cavmae` trains its own warm-up, so it takes as long as all that it is compared with."""

CONTRASTS: tuple[tuple[str, str, str], ...] = (
    ("full", "instance", "DICCAE against InfoNCE alone"),
    ("full", "random_labels", "pseudo-labels against labels by chance"),
    ("gamma0", "instance", "labels and alignment, without confusion weights"),
    ("gamma0", "pseudo_labels", "class-level alignment"),
    ("gamma0", "alignment", "own-stream cross-entropy"),
    ("full", "gamma0", "confusion weights"),
    ("full", "shuffled", "whom a class is confused with, and not how large weights are"),
    ("full", "constant", "weights that differ from pair to pair"),
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
