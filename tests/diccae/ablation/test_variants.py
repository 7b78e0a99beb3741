"""Sweeps: a variant for each value, on top of whatever is swept."""

from pathlib import Path

import pytest

from diccae.ablation.variants import chosen_variants, swept, variant_config
from diccae.config import RunConfig
from diccae.errors import UsageError
from training.evaluation.variants import DEFAULT_VARIANTS, VARIANTS

FULL = {"full": VARIANTS["full"]}


def test_variants_of_a_file_are_named_and_swept_like_the_others(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("wide: {loss: {confusion: 2.0}}\nnarrow: {loss: {confusion: 0.1}}\n")

    def names(*chosen: str, sweeps: tuple[str, ...] = (), of: tuple[str, ...] = ("full",)) -> list:
        return list(chosen_variants(chosen, str(file), sweeps, of))

    assert names() == ["wide", "narrow"]
    assert names("full") == ["full", "wide", "narrow"]
    assert names("full", "narrow") == ["full", "narrow"]
    points = chosen_variants(["wide"], str(file), ["confusion.gamma=0,3"], ["wide"])
    assert list(points) == ["wide", "wide@confusion.gamma=0", "wide@confusion.gamma=3"]
    config = variant_config(RunConfig(), "x", points["wide@confusion.gamma=3"], 0)
    assert (config.loss.confusion, config.confusion.gamma) == (2.0, 3.0)
    with pytest.raises(UsageError, match=r"no variant wied; there are instance.* wide, narrow$"):
        names("wied")


def test_without_names_the_shipped_ones_run_unless_a_sweep_is_asked_for() -> None:
    assert list(chosen_variants([], None, [], ["full"])) == list(DEFAULT_VARIANTS)
    swept_only = chosen_variants([], None, ["confusion.gamma=1"], ["full"])
    assert list(swept_only) == ["confusion.gamma=1"]
    with pytest.raises(UsageError, match="--variants-file can hold others"):
        chosen_variants([], None, ["confusion.gamma=1"], ["fool"])


def test_a_sweep_is_a_variant_for_each_value() -> None:
    variants = {name: VARIANTS[name] for name in ("full", "true_labels")}
    made = swept(["confusion.gamma=0,0.5", "rounds.label_noise=0.2"], variants)
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
    assert not swept(["optim.lr=0.1"], FULL)["optim.lr=0.1"].shares_warmup


def test_a_preset_of_a_variant_brings_its_sizes(tmp_path: Path) -> None:
    """The recipe has all sizes already, and each point of a sweep was as large as it."""
    recipe = RunConfig.model_validate({"encoder": {"preset": "tiny", "dim": 64, "projection": 32}})
    points = swept(["encoder.preset=tiny,small,base"], FULL)
    made = [variant_config(recipe, name, points[name], 0).encoder for name in points]
    assert [(e.stem, e.dim, e.depth, e.n_heads) for e in made] == [
        ("conv", 128, 1, 4), ("conv", 256, 3, 4), ("patch", 768, 11, 12),
    ]  # fmt: skip
    assert {e.projection for e in made} == {32}
    file = tmp_path / "own.yaml"
    file.write_text("wide: {encoder: {preset: base, dim: 96}}\nsame: {encoder: {depth: 2}}\n")
    own = chosen_variants([], str(file), [], ["full"])
    wide, same = (variant_config(recipe, name, own[name], 0).encoder for name in own)
    assert (wide.stem, wide.dim, wide.depth) == ("patch", 96, 11)
    assert (same.stem, same.dim, same.depth) == ("conv", 64, 2)


def test_a_key_deep_in_a_section_leaves_its_neighbours() -> None:
    """All other keys of the recipe's optimiser became those of a file that names none."""
    recipe = RunConfig.model_validate(
        {"finetune": {"optim": {"lr": 2e-3, "head_lr_scale": 1.0, "schedule": "steps"}}}
    )
    points = swept(["finetune.optim.lr=0.1"], FULL)
    optim = variant_config(recipe, "x", points["finetune.optim.lr=0.1"], 0).finetune.optim
    assert (optim.lr, optim.head_lr_scale, optim.schedule) == (0.1, 1.0, "steps")


@pytest.mark.parametrize("preset", ["huge", "[tiny]"])
def test_a_preset_that_there_is_not_is_refused_by_its_key(preset: str) -> None:
    points = swept([f"encoder.preset={preset}"], FULL)
    with pytest.raises(UsageError, match=r"encoder\.preset: Input should be 'tiny'"):
        variant_config(RunConfig(), "x", *points.values(), 0)


@pytest.mark.parametrize("sweep", ["gamma=1", "confusion.gamma", "confusion.gamma="])
def test_what_is_no_sweep_is_refused(sweep: str) -> None:
    with pytest.raises(UsageError, match=r"expected section\.key=value,value"):
        swept([sweep], FULL)


def test_weights_can_be_those_of_each_seed() -> None:
    config = RunConfig.model_validate({"encoder": {"init": "out/seed-{seed}/encoder"}})
    variant = swept(["confusion.gamma=1"], FULL)["confusion.gamma=1"]
    made = variant_config(config, "x", variant, 2)
    assert made.encoder.init == "out/seed-2/encoder"
