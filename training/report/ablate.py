"""An ablation as Markdown tables and one picture.

Knows nothing of how variants are trained. Invariant: every mean stands beside its number of seeds,
every difference beside its interval.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.passwords import without_passwords
from training.evaluation.metrics import headlines
from training.evaluation.paired import PairedDifference, spread
from training.evaluation.variants import Variant

Metrics = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Metrics by variant and seed."""


def values_of(metrics: Metrics, name: str) -> dict[str, dict[int, float]]:
    """One metric by variant and seed, where it was measured."""
    return {
        variant: {seed: found[name] for seed, found in by_seed.items() if name in found}
        for variant, by_seed in metrics.items()
    }


def variant_rows(metrics: Metrics, metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and one row a variant: seeds, then mean and standard deviation in per cent.

    Beside the metric that variants are judged by stand the headlines of all that is measured.
    """
    beside = [
        name
        for name in (*headlines(), "pseudo_labels/nmi")
        if name != metric and any(any(values_of(metrics, name)[v].values()) for v in metrics)
    ]
    rows = []
    for variant in metrics:
        cells = [variant, str(len(metrics[variant]))]
        for name in (metric, *beside):
            found = values_of(metrics, name)[variant]
            cells.append(_mean_sd(found) if found else "-")
        rows.append(cells)
    return ["variant", "seeds", metric, *beside], rows


def contrast_rows(differences: Sequence[PairedDifference]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a contrast, in points of per cent."""
    rows = [
        [
            f"{d.variant} - {d.reference}",
            str(d.n),
            f"{100 * d.mean:+.1f}",
            "-" if math.isnan(d.sd) else f"{100 * d.sd:.1f}",
            "-" if math.isnan(d.low) else f"{100 * d.low:+.1f} to {100 * d.high:+.1f}",
            d.tells,
        ]
        for d in differences
    ]
    return ["difference", "seeds", "points", "s.d.", "95 % interval", "of"], rows


def note(differences: Sequence[PairedDifference], n_test: int, split: str) -> str:
    """What a reader has to know to read the intervals right."""
    seeds = max((d.n for d in differences), default=1)
    few = " One seed gives no interval." if seeds < 2 else ""
    return (
        f"Measured on {n_test:,} {split} clips. Differences are paired by seed; intervals are "
        f"Student's t over seeds, not corrected for {len(differences)} comparisons, and say "
        f"nothing of other test clips.{few}"
    )


def markdown(
    metrics: Metrics,
    metric: str,
    differences: Sequence[PairedDifference],
    questions: Mapping[str, Variant],
    pinned: Mapping[str, Any],
    n_test: int,
) -> str:
    """The whole ablation as a page of Markdown."""
    store = pinned["store"]
    asked = [[name, variant.question] for name, variant in questions.items()]
    return "\n".join(
        [
            f"# Ablation by {metric}",
            "",
            f"Store {without_passwords(store['uri'])} version {store['version']} "
            f"(digest {store['digest'][:12]}), "
            f"config {pinned['config_hash']}. Per cent, mean ± s.d. over seeds.",
            "",
            *_table(*variant_rows(metrics, metric)),
            "",
            *_table(*contrast_rows(differences)),
            "",
            note(differences, n_test, pinned["split"]),
            "",
            *_table(["variant", "what it is"], asked),
            "",
            "![variants and differences](ablation.png)",
            "",
        ]
    )


def draw(
    metrics: Metrics, metric: str, differences: Sequence[PairedDifference], path: Path
) -> None:
    """Each seed as a point with the mean of its variant; differences with their intervals."""
    from matplotlib.figure import Figure

    values = {variant: x for variant, x in values_of(metrics, metric).items() if x}
    height = 1.2 + 0.34 * max(len(values), len(differences))
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 4))
    for y, found in enumerate(values.values()):
        left.plot([100 * v for v in found.values()], [y] * len(found), "o", color="#9bb7dd", ms=5)
        left.plot(100 * spread(found).mean, y, "|", color="#1f4e91", ms=16, mew=2.5)
    left.set_yticks(range(len(values)), list(values))
    left.set_xlabel(f"{metric}, %: seeds and mean")
    for y, d in enumerate(differences):
        colour = "#1f7a4d" if d.is_clear and d.mean > 0 else "#b03a3a" if d.is_clear else "#777777"
        if not math.isnan(d.low):
            right.plot([100 * d.low, 100 * d.high], [y, y], color=colour, lw=2)
        right.plot(100 * d.mean, y, "o", color=colour, ms=6)
    right.axvline(0, color="black", lw=0.8)
    right.set_yticks(range(len(differences)), [f"{d.variant} - {d.reference}" for d in differences])
    right.set_xlabel("points, paired by seed, 95 % interval")
    for axes, n_rows in ((left, len(values)), (right, len(differences))):
        axes.set_ylim(max(n_rows, 1) - 0.5, -0.5)
        axes.grid(axis="x", color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def draw_response(
    metrics: Metrics, metric: str, variants: Mapping[str, Variant], path: Path
) -> bool:
    """Dose and response of every sweep with values that are numbers. Returns: whether one is."""
    from matplotlib.figure import Figure

    found = values_of(metrics, metric)
    curves = _curves(found, variants)
    if not curves:
        return False
    figure = Figure(figsize=(6.0 * len(curves), 4.0), layout="constrained")
    for axes, (key, by_variant) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        for name, points in by_variant.items():
            doses = sorted(points)
            spreads = [spread(points[dose]) for dose in doses]
            means = [100 * s.mean for s in spreads]
            errors = [0.0 if math.isnan(s.sd) else 100 * s.sd for s in spreads]
            axes.errorbar(doses, means, errors, marker="o", ms=5, capsize=3, label=name)
        for name in ("instance", "random_labels"):
            if found.get(name):
                mean = 100 * spread(found[name]).mean
                axes.axhline(mean, color="black", lw=0.8, ls="--" if name == "instance" else ":")
                axes.annotate(name, (0.01, mean), xycoords=("axes fraction", "data"), va="bottom")
        axes.set_xlabel(key)
        axes.set_ylabel(f"{metric}, %: mean and s.d. over seeds")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return True


def _curves(
    found: Mapping[str, Mapping[int, float]], variants: Mapping[str, Variant]
) -> dict[str, dict[str, dict[float, Mapping[int, float]]]]:
    """Values by swept key, variant, dose and seed."""
    curves: dict[str, dict[str, dict[float, Mapping[int, float]]]] = {}
    for name, by_seed in found.items():
        dose = variants[name].dose
        if dose is None or not by_seed:
            continue
        swept, key, value = dose
        with contextlib.suppress(ValueError):  # A word is a variant and not a point of a curve.
            number = float(value)
            curves.setdefault(key, {}).setdefault(swept, {})[number] = by_seed
    return curves


def _mean_sd(by_seed: Mapping[int, float]) -> str:
    found = spread(by_seed)
    sd = "" if math.isnan(found.sd) else f" ± {100 * found.sd:.1f}"
    return f"{100 * found.mean:.1f}{sd}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
