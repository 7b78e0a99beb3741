"""Fine-tuning: it learns, resumes to the bit, averages, and can be plain cross-entropy."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.memory import SHAPE, MemoryReader, memory_index
from torch.nn import functional as F

from training.config import PretrainConfig, TrainingConfig
from training.data.device import on_device
from training.data.order import BatchPlan, EpochReads, FrameDraw, WindowPlan, lanes_of
from training.errors import TrainingError
from training.loop.finetuner import Finetuner
from training.loop.hooks import Hooks, World
from training.model.classifier import Classifier
from training.model.encoder import Encoder


def _config(**tuning: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "encoder": {"preset": "tiny", "dim": 32, "projection": 16},
            "data": {"lanes": 4, "fbank_mean": 0.0, "fbank_std": 3.0},
            "pretrain": {"log_every": 1},
            "confusion": {"update_steps": 2},
            "finetune": {
                "epochs": 3,
                "batch_size": 16,
                "optim": {"lr": 2e-3, "head_lr_scale": 1.0, "warmup_epochs": 0},
                **tuning,
            },
        }
    )


def _tuner(config: TrainingConfig, states: list[dict[str, Any]] | None = None) -> Finetuner:
    index = memory_index()
    torch.manual_seed(config.seed)
    encoder = Encoder(config.encoder, SHAPE)
    auxiliary = config.finetune.auxiliary > 0
    classifier = Classifier(encoder, len(index.classes), config.finetune.mode, auxiliary)
    plan = BatchPlan.of(len(index), config.finetune.batch_size, config.data)
    reader = MemoryReader(WindowPlan(index, plan, lanes_of(0, 1, plan.lanes), config.seed))

    def save(state: dict[str, Any]) -> None:
        if states is not None:
            states.append(copy.deepcopy(state))

    hooks = Hooks(lambda step, metrics: None, save, lambda content: "nowhere")
    return Finetuner(config, classifier, index, reader=reader, world=World(), hooks=hooks)


def _weights(tuner: Finetuner) -> list[torch.Tensor]:
    return [v.clone() for v in tuner.classifier.state_dict().values()]


def test_it_learns_the_classes() -> None:
    tuner = _tuner(_config(epochs=8))
    assert tuner.run()["accuracy"] > 0.8


def test_resumed_fine_tuning_equals_the_uninterrupted_one() -> None:
    config = _config(mixup=0.5, label_smoothing=0.1, balanced=True, average_from_epoch=2)
    states: list[dict[str, Any]] = []
    whole = _tuner(config, states)
    whole.run()
    for state in states[:-1]:
        resumed = _tuner(config)
        resumed.run(state)
        pairs = zip(_weights(whole), _weights(resumed), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"resumed at {state['step']}"


def test_averaged_weights_are_the_mean_of_the_epochs() -> None:
    states: list[dict[str, Any]] = []
    tuner = _tuner(_config(average_from_epoch=2), states)
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
    tuner = _tuner(_config(epochs=1).model_copy(update={"pretrain": switches}))
    tuner.run()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert set(attentions) == {(sdpa, dtype)}


@pytest.mark.slow
def test_compiled_fine_tuning_takes_the_same_steps() -> None:
    plain = _tuner(_config(epochs=1))
    plain.run()
    compiled = _tuner(
        _config(epochs=1).model_copy(update={"pretrain": PretrainConfig(compile=True)})
    )
    compiled.run()
    for a, b in zip(_weights(plain), _weights(compiled), strict=True):
        # Adam turns the last bits of a tiny gradient into a whole step of 2e-3.
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_with_every_addition_off_the_loss_is_plain_cross_entropy() -> None:
    tuner = _tuner(_config(auxiliary=0.0, confusion=0.0))
    first_epoch = EpochReads(0, 0, FrameDraw(1))
    batch = next(on_device(tuner.reader.stream([first_epoch]), torch.device("cpu")))
    inputs = tuner._inputs(batch, 0)
    logits = tuner.classifier(inputs.fbank_nTM, inputs.frames_nFCHW)
    assert list(logits) == ["fusion"]
    expected = F.cross_entropy(logits["fusion"], batch.label_n)
    tuner._train_step(batch)
    assert float(tuner.meter.sums["loss"]) == pytest.approx(expected.item(), rel=1e-6)


def test_confusion_weights_apply_after_their_epoch() -> None:
    plain, weighted = _tuner(_config(confusion=0.0)), _tuner(_config(confusion=1.0))
    plain.run()
    weighted.run()
    assert float(plain.confusion.weights_KK.max()) == 1.0
    assert float(weighted.confusion.weights_KK.max()) > 1.0
    pairs = zip(_weights(plain), _weights(weighted), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_clips_without_a_label_are_refused() -> None:
    tuner = _tuner(_config())
    index = memory_index()
    labels = np.where(np.arange(len(index)) == 3, -1, index.labels_N)
    bare = index.take(np.arange(len(index)))
    object.__setattr__(bare, "labels_N", labels)
    with pytest.raises(TrainingError, match="clip0000003_000003"):
        Finetuner(
            tuner.config,
            tuner.classifier,
            bare,
            reader=tuner.reader,
            world=World(),
            hooks=tuner.hooks,
        )
