"""Variants of an ablation, their paired statistics, and what is shown of them."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from training.evaluation.paired import contrasts, paired_difference, spread
from training.evaluation.variants import CONTRASTS, DEFAULT_VARIANTS, VARIANTS, Variant, dotted
from training.report.ablate import contrast_rows, draw, markdown, note, variant_rows

_RNG = np.random.default_rng(0)
_SEEDS = {seed: float(level) for seed, level in enumerate(_RNG.normal(0.6, 0.1, 5))}
_VALUES = {
    "instance": _SEEDS,
    "full": {s: x + 0.01 + 0.002 * s for s, x in _SEEDS.items()},
    "gamma0": {0: 0.7},
}
_METRICS = {v: {s: {"probe/audio_video": x} for s, x in by.items()} for v, by in _VALUES.items()}


def test_difference_is_the_paired_t_test_of_scipy() -> None:
    found = paired_difference(_VALUES, "full", "instance")
    assert found is not None
    full, instance = (np.array(list(_VALUES[v].values())) for v in ("full", "instance"))
    expected = stats.ttest_rel(full, instance).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx((full - instance).mean())
    assert found.is_clear
    # The same values without their pairs say nothing: seeds differ more than variants.
    unpaired = stats.ttest_ind(full, instance).confidence_interval(0.95)
    assert unpaired.low < 0 < unpaired.high


def test_one_seed_gives_no_interval_and_no_common_seed_no_difference() -> None:
    one = paired_difference(_VALUES, "gamma0", "instance")
    assert one is not None
    assert one.n == 1
    assert math.isnan(one.low)
    assert not one.is_clear
    assert paired_difference({"full": {0: 1.0}, "instance": {1: 1.0}}, "full", "instance") is None
    assert paired_difference(_VALUES, "full", "cavmae") is None


def test_contrasts_are_those_of_the_variants_at_hand() -> None:
    found = [(d.variant, d.reference) for d in contrasts({**_VALUES, "k64": {0: 0.5}}, ["k64"])]
    assert found == [
        ("full", "instance"),
        ("gamma0", "instance"),
        ("full", "gamma0"),
        ("k64", "full"),
    ]
    assert all({a, b} <= VARIANTS.keys() for a, b, _ in CONTRASTS)


def test_only_what_acts_after_the_labels_shares_the_warmup() -> None:
    assert all(VARIANTS[name].shares_warmup for name in DEFAULT_VARIANTS)
    assert not VARIANTS["cavmae"].shares_warmup
    for changes in ({"optim": {"lr": 1e-3}}, {"rounds": {"features": "pass"}}, {"seed": 3}):
        assert not Variant("", changes).shares_warmup, list(dotted(changes))
    assert Variant("", {"clustering": {"k": 64, "guard": {"max_churn": 1.0}}}).shares_warmup


def test_mean_and_deviation_are_of_the_seeds() -> None:
    assert spread({0: 1.0, 5: 3.0}) == (2, 2.0, pytest.approx(math.sqrt(2)))
    assert math.isnan(spread({0: 1.0}).sd)
    with pytest.raises(ValueError, match="no seed"):
        spread({})


def test_tables_and_figure_show_every_variant_and_difference(tmp_path: Path) -> None:
    differences = contrasts(_VALUES)
    header, rows = variant_rows(_METRICS, "probe/audio_video")
    assert header[:3] == ["variant", "seeds", "probe/audio_video"]
    assert [row[:2] for row in rows] == [["instance", "5"], ["full", "5"], ["gamma0", "1"]]
    _, told = contrast_rows(differences)
    assert told[0][0] == "full - instance"
    assert told[0][2] == "+1.4"
    assert told[-1][3:5] == ["-", "-"]
    pinned = {
        "store": {"uri": "s3://b/vgg", "version": 3, "digest": "ab" * 32},
        "config_hash": "c0ffee",
        "split": "validation",
    }
    chosen = {name: VARIANTS[name] for name in _VALUES}
    page = markdown(_METRICS, "probe/audio_video", differences, chosen, pinned, 1234)
    for said in ("version 3", "c0ffee", "1,234 validation clips", "| full - instance | 5 | +1.4"):
        assert said in page
    draw(_METRICS, "probe/audio_video", differences, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "not corrected for 3 comparisons" in note(differences, 1234, "test")
