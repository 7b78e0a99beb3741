"""Variants of an ablation and their paired statistics."""

import math

import numpy as np
import pytest
from scipy import stats

from training.evaluation.paired import contrasts, paired_difference, spread
from training.evaluation.variants import CONTRASTS, DEFAULT_VARIANTS, VARIANTS, Variant, dotted

_RNG = np.random.default_rng(0)
_SEEDS = {seed: float(level) for seed, level in enumerate(_RNG.normal(0.6, 0.1, 5))}
_VALUES = {
    "instance": _SEEDS,
    "full": {s: x + 0.01 + 0.002 * s for s, x in _SEEDS.items()},
    "gamma0": {0: 0.7},
}


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
        ("k64", "instance"),
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
