"""Fine-tuning: it learns, resumes to the bit, averages, and can be plain cross-entropy."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.memory import N_CLASSES, memory_index
from support.ranks import run_ranks
from support.trainers import finetune_config, make_tuner
from torch.nn import functional as F

from training.config import PretrainConfig
from training.data.device import on_device
from training.data.order import EpochReads, FrameDraw
from training.data.rows import RowIndex
from training.errors import TrainingError
from training.loop.finetuner import Finetuner
from training.loop.hooks import World
from training.loop.mixup import meeting

_CPU = torch.device("cpu")


def _weights(tuner: Finetuner) -> list[torch.Tensor]:
    return [v.clone() for v in tuner.classifier.state_dict().values()]


def test_it_learns_the_classes() -> None:
    tuner = make_tuner(finetune_config(epochs=8))
    assert tuner.run()["accuracy"] > 0.8


def test_resumed_fine_tuning_equals_the_uninterrupted_one() -> None:
    config = finetune_config(mixup=0.5, label_smoothing=0.1, balanced=True, average_from_epoch=2)
    states: list[dict[str, Any]] = []
    whole = make_tuner(config, states)
    whole.run()
    for state in states[:-1]:
        resumed = make_tuner(config)
        resumed.run(state)
        pairs = zip(_weights(whole), _weights(resumed), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"resumed at {state['step']}"


def test_averaged_weights_are_the_mean_of_the_epochs() -> None:
    states: list[dict[str, Any]] = []
    tuner = make_tuner(finetune_config(average_from_epoch=2), states)
    tuner.run()
    means = [
        torch.stack([s["classifier"][k] for s in states[1:]]).mean(0)
        for k in states[0]["classifier"]
    ]
    for mean, weight in zip(means, _weights(tuner), strict=True):
        torch.testing.assert_close(weight, mean)


@pytest.mark.parametrize("sdpa", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_switches_of_numerics_reach_fine_tuning(
    precision: str, sdpa: bool, attentions: list[tuple[bool, torch.dtype]]
) -> None:
    switches = PretrainConfig.model_validate({"precision": precision, "sdpa": sdpa})
    config = finetune_config(epochs=1, confusion=0.0)
    tuner = make_tuner(config.model_copy(update={"pretrain": switches}))
    tuner.run()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert set(attentions) == {(sdpa, dtype)}


@pytest.mark.slow
def test_compiled_fine_tuning_takes_the_same_steps() -> None:
    config = finetune_config(epochs=1, confusion_after_epochs=0)
    plain = make_tuner(config)
    plain.run()
    compiled = make_tuner(config.model_copy(update={"pretrain": PretrainConfig(compile=True)}))
    compiled.run()
    for a, b in zip(_weights(plain), _weights(compiled), strict=True):
        # Adam turns the last bits of a tiny gradient into a whole step of 2e-3.
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_with_every_addition_off_the_loss_is_plain_cross_entropy() -> None:
    tuner = make_tuner(finetune_config(auxiliary=0.0, confusion=0.0))
    first_epoch = EpochReads(0, 0, FrameDraw(1))
    batch = next(on_device(tuner.reader.stream([first_epoch]), torch.device("cpu")))
    inputs = tuner._inputs(batch, 0)
    logits = tuner.classifier(inputs.fbank_nTM, inputs.frames_nFCHW)
    assert list(logits) == ["fusion"]
    expected = F.cross_entropy(logits["fusion"], batch.labels_nL[:, 0].long())
    tuner._train_step(batch)
    assert float(tuner.meter.sums["loss"]) == pytest.approx(expected.item(), rel=1e-6)


def test_confusion_weights_apply_after_their_epoch() -> None:
    plain, weighted = (
        make_tuner(finetune_config(confusion=0.0)),
        make_tuner(finetune_config(confusion=1.0)),
    )
    plain.run()
    weighted.run()
    assert float(plain.confusion.weights_KK.max()) == 1.0
    assert float(weighted.confusion.weights_KK.max()) > 1.0
    pairs = zip(_weights(plain), _weights(weighted), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_the_degree_that_is_logged_is_of_what_was_seen() -> None:
    """Half of the uniform estimate it begins with was left after an epoch: it fell by itself."""
    still = {"lr": 1e-12, "head_lr_scale": 1.0, "warmup_epochs": 0}
    taught, tuner = make_tuner(finetune_config(epochs=8)), make_tuner(finetune_config(optim=still))
    taught.run()
    tuner.classifier.load_state_dict(taught.classifier.state_dict())
    logged: list[dict[str, float]] = []
    tuner.hooks = tuner.hooks._replace(log=lambda step, metrics: logged.append(metrics))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    accumulate = tuner.confusion.accumulate

    def keep(posteriors_BK: torch.Tensor, labels_B: torch.Tensor) -> None:
        seen.append((posteriors_BK, labels_B))
        accumulate(posteriors_BK, labels_B)

    tuner.confusion.accumulate = keep  # type: ignore[method-assign]
    tuner.run()
    posteriors, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    own = posteriors[torch.arange(len(labels)), labels]
    steady = 1 - float(torch.stack([own[labels == k].mean() for k in range(N_CLASSES)]).mean())
    assert steady < 0.5, "as uniform as it begins"
    assert "confusion/mean_offdiagonal" not in logged[0], "nothing was counted yet"
    degrees = [m["confusion/mean_offdiagonal"] for m in logged[1:]]
    assert degrees == pytest.approx([steady] * len(degrees), abs=0.1)
    assert float(tuner.confusion.mean_offdiagonal) > degrees[-1] + 0.02, "nothing was left of it"


def test_a_static_estimate_of_rounds_leaves_fine_tuning_its_own() -> None:
    """No round publishes one here: kept as it began, every weight was 1."""
    config = finetune_config(epochs=2, confusion_pseudo_counts=0.0)
    found = []
    for update in ("dynamic", "static"):
        of_rounds = config.confusion.model_copy(update={"update": update})
        tuner = make_tuner(config.model_copy(update={"confusion": of_rounds}))
        tuner.run()
        found.append(tuner.confusion.weights_KK)
    assert torch.equal(*found)
    assert float(found[0].max()) > 1


def test_few_clips_of_a_class_are_little_evidence_of_whom_it_is_confused_with() -> None:
    """As they are in the train split, not as often as a balanced draw shows them."""
    index = memory_index()
    labels_NL = index.labels_NL.copy()
    labels_NL[np.flatnonzero(index.labels_N == 0)[1:]] = 1
    uneven = replace(index, labels_NL=labels_NL)
    tuner = make_tuner(finetune_config(balanced=True, confusion_pseudo_counts=3), index=uneven)
    clips_C = np.bincount(uneven.labels_N)
    assert clips_C[0] == 1
    assert tuner.confusion.prior_K1[:, 0].tolist() == (3 / clips_C).tolist()
    doubting = make_tuner(finetune_config(confusion_pseudo_counts=1e6))
    doubting.run()
    assert 1.0 <= float(doubting.confusion.weights_KK.max()) < 1.001


def test_confusion_is_counted_over_clips_that_met_nobody() -> None:
    """A mixed clip is taken for either class, which confuses nobody."""
    tuner = make_tuner(finetune_config(mixup=0.5))
    frames = EpochReads(0, 0, FrameDraw(tuner.config.data.frames_per_clip))
    tuner._train_step(next(on_device(tuner.reader.stream([frames]), _CPU)))
    met = meeting(tuner.plan.batch_size, 0.5, tuner.config.seed, 0, 0)
    n_alone = int((met.own_B == 1).sum())
    assert 0 < n_alone < tuner.plan.batch_size
    assert int(tuner.confusion.sums_KK1[:, -1].sum()) == n_alone
    with pytest.raises(ValidationError, match=r"mixup = 1 with confusion = 1: .*not mixed"):
        finetune_config(mixup=1.0)


def test_additions_that_begin_with_the_last_epoch_act() -> None:
    tuner = make_tuner(finetune_config(epochs=2, average_from_epoch=2))
    used: list[float] = []
    loss = tuner._loss

    def watched(logits: Mapping[str, torch.Tensor], targets: torch.Tensor, epoch: int) -> Any:
        used.append(float(tuner.confusion.weights_KK.max()))
        return loss(logits, targets, epoch)

    tuner._loss = watched  # type: ignore[method-assign]
    tuner.run()
    assert used[-1] > 1
    assert tuner.n_averaged == 1


def test_a_batch_that_does_not_divide_into_the_lanes_of_pretraining_has_fewer() -> None:
    found = []
    for lanes in (4, 2):
        config = finetune_config(batch_size=18, epochs=1)
        data = config.data.model_copy(update={"lanes": lanes})
        tuner = make_tuner(config.model_copy(update={"data": data}))
        tuner.run()
        found.append(_weights(tuner))
    assert len(tuner.lanes) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_clips_without_a_label_are_refused() -> None:
    tuner = make_tuner(finetune_config())
    index = memory_index()
    labels = np.where(np.arange(len(index)) == 3, -1, index.labels_N)
    bare = replace(index, labels_NL=labels.astype(np.int32)[:, None])
    with pytest.raises(TrainingError, match="clip0000003_000003"):
        Finetuner(
            tuner.config,
            tuner.classifier,
            bare,
            reader=tuner.reader,
            world=World(),
            hooks=tuner.hooks,
        )


def _mixing_worker(rank: int, size: int) -> list[float]:
    tuner = make_tuner(finetune_config(mixup=1.0, confusion=0.0, epochs=1), world=World(rank, size))
    losses = []
    tuner.hooks = tuner.hooks._replace(log=lambda _, metrics: losses.append(metrics["loss"]))
    tuner.run()
    return losses


def test_clips_meet_across_workers() -> None:
    one, two, three = (run_ranks(size, _mixing_worker)[0] for size in (1, 2, 3))
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-3)
    assert three == pytest.approx(one, rel=1e-3)


def test_it_leaves_checkpoints_between_the_ends_of_epochs() -> None:
    states: list[dict[str, Any]] = []
    often = PretrainConfig(checkpoint_every=2)
    config = finetune_config(epochs=2).model_copy(update={"pretrain": often})
    make_tuner(config, states).run()
    assert [state["step"] for state in states] == [2, 3, 4, 6]


def _of_two_classes() -> RowIndex:
    """Every third clip is of its class and of the next one."""
    index = memory_index()
    more_N = np.where(np.arange(len(index)) % 3 == 0, (index.labels_N + 1) % N_CLASSES, -1)
    return replace(index, labels_NL=np.stack([index.labels_N, more_N], 1).astype(np.int32))


def test_clips_of_several_classes_are_learnt_by_binary_cross_entropy() -> None:
    index = _of_two_classes()
    logged: list[dict[str, float]] = []
    config = finetune_config(loss="bce", confusion=0.0, auxiliary=0.0, epochs=20, balanced=True)
    tuner = make_tuner(config, index=index)
    tuner.hooks = tuner.hooks._replace(log=lambda step, metrics: logged.append(metrics))
    batch = next(on_device(tuner.reader.stream([EpochReads(0, 0, FrameDraw(1))]), _CPU))
    inputs = tuner._inputs(batch, epoch=0)
    with torch.no_grad():
        logits_nC = tuner.model(inputs.fbank_nTM, inputs.frames_nFCHW)["fusion"].double()
    hot_nC = torch.zeros_like(logits_nC)
    for row, labels in enumerate(index.labels_NL[batch.read.position].tolist()):
        hot_nC[row, [label for label in labels if label >= 0]] = 1.0
    assert (hot_nC.sum(1) == 2).any()
    log_p, log_not = F.logsigmoid(logits_nC), F.logsigmoid(-logits_nC)
    literal = -(hot_nC * log_p + (1 - hot_nC) * log_not).mean()
    torch.testing.assert_close(
        tuner._loss({"fusion": logits_nC}, inputs.targets_nC, 0), literal, atol=1e-6, rtol=1e-6
    )
    last = tuner.run()
    assert last["accuracy"] > 0.9
    assert last["loss"] < logged[0]["loss"] / 2
    assert "confusion/mean_offdiagonal" not in last


def test_clips_of_several_classes_are_refused_by_cross_entropy() -> None:
    with pytest.raises(TrainingError, match=r"16 clips .* such as clip0000000.*finetune.loss to b"):
        make_tuner(finetune_config(), index=_of_two_classes())
    with pytest.raises(ValidationError, match=r"loss = bce with confusion = 1.*confusion to 0"):
        finetune_config(loss="bce")
