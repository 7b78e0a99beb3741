"""Sweeps: a variant for each value, on top of whatever is swept."""

import pytest

from diccae.ablation.variants import swept, variant_config
from diccae.config import RunConfig
from diccae.errors import UsageError


def test_a_sweep_is_a_variant_for_each_value() -> None:
    made = swept(["confusion.gamma=0,0.5", "rounds.label_noise=0.2"], ["full", "true_labels"])
    assert list(made) == [
        "confusion.gamma=0",
        "confusion.gamma=0.5",
        "true_labels@confusion.gamma=0",
        "true_labels@confusion.gamma=0.5",
        "rounds.label_noise=0.2",
        "true_labels@rounds.label_noise=0.2",
    ]
    assert all(variant.shares_warmup for variant in made.values())
    name = "true_labels@rounds.label_noise=0.2"
    rounds = variant_config(RunConfig(), name, made[name], 3).rounds
    assert (rounds.labels, rounds.label_noise) == ("true", 0.2)
    assert not swept(["optim.lr=0.1"], ["full"])["optim.lr=0.1"].shares_warmup


@pytest.mark.parametrize("sweep", ["gamma=1", "confusion.gamma", "confusion.gamma="])
def test_what_is_no_sweep_is_refused(sweep: str) -> None:
    with pytest.raises(UsageError, match=r"expected section\.key=value,value"):
        swept([sweep], ["full"])


def test_weights_can_be_those_of_each_seed() -> None:
    config = RunConfig.model_validate({"encoder": {"init": "out/seed-{seed}/encoder"}})
    made = variant_config(
        config, "x", swept(["confusion.gamma=1"], ["full"])["confusion.gamma=1"], 2
    )
    assert made.encoder.init == "out/seed-2/encoder"
