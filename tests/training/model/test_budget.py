"""The budget against published FLOPs, real memory of autograd, and real parameter counts."""

import pytest
import torch

from training.config import (
    EncoderConfig,
    FinetuneConfig,
    LossConfig,
    PretrainConfig,
    TrainingConfig,
)
from training.model.budget import budget_table, finetuning_budget, pretraining_budget
from training.model.encoder import Encoder, InputShape

_VGGSOUND = InputShape(1024, 128, 224)
_BASE = EncoderConfig(preset="base")
_SMALL = InputShape(200, 128, 96)


@pytest.mark.parametrize(
    ("options", "giga"),
    [({"loss": LossConfig(reconstruction=1.0)}, 78.1), ({}, 131.8 + 11.6)],
    ids=["masked with decoder", "unmasked with fusion"],
)
def test_pretraining_flops_equal_the_published_ones(options, giga):
    budget = pretraining_budget(TrainingConfig(encoder=_BASE, **options), _VGGSOUND)
    assert budget.flops_forward == pytest.approx(giga * 1e9, rel=0.02)
    assert budget.flops_train == 3 * budget.flops_forward


def test_masked_pass_without_its_decoder_costs_the_published_flops():
    config = TrainingConfig(encoder=_BASE, loss=LossConfig(reconstruction=1.0))
    kept_tokens, audio_hidden, video_hidden, width = 128 + 49, 384, 147, 512
    tokens = kept_tokens + audio_hidden + video_hidden
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    # the last block's MLP and the predictions run on hidden tokens only
    decoder = 8 * block - 16 * kept_tokens * width**2 + 2 * kept_tokens * 768 * width
    decoder += 2 * width * (256 * audio_hidden + 768 * video_hidden)
    trunk = pretraining_budget(config, _VGGSOUND).flops_forward - decoder
    assert trunk == pytest.approx(33.8e9, rel=0.02)


@pytest.mark.parametrize(("mode", "giga"), [("multimodal", 132.4), ("audio", 96.8)])
def test_finetuning_flops_equal_the_published_ones(mode, giga):
    config = TrainingConfig(encoder=_BASE, finetune=FinetuneConfig(mode=mode, auxiliary=0))
    budget = finetuning_budget(config, _VGGSOUND, 309)
    assert budget.flops_forward == pytest.approx(giga * 1e9, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_memory_equals_what_autograd_keeps(precision):
    config = TrainingConfig(
        encoder=EncoderConfig(preset="tiny"), pretrain=PretrainConfig(precision=precision)
    )
    budget = pretraining_budget(config, _SMALL)
    encoder = Encoder(config.encoder, _SMALL)
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    fbank, frames = torch.randn(6, 200, 128), torch.randn(6, 1, 3, 96, 96)
    bf16 = precision == "bf16"
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        h = encoder(fbank, frames).h
    weights = {p.data_ptr() for p in encoder.parameters()}
    activations = sum(size for place, size in kept.items() if place not in weights)
    fixed = budget.bytes_fixed - 16 * budget.trainable - 4 * (budget.parameters - budget.trainable)
    assert 6 * budget.bytes_per_clip + fixed == pytest.approx(activations, rel=0.02)
    del h


def test_parameters_equal_those_of_the_model():
    config = TrainingConfig(encoder=EncoderConfig(preset="tiny"))
    encoder = Encoder(config.encoder, _SMALL)
    budget = pretraining_budget(config, _SMALL)
    assert budget.parameters == sum(p.numel() for p in encoder.parameters())
    assert budget.trainable == sum(p.numel() for p in encoder.parameters() if p.requires_grad)


def test_table_shows_hours_only_from_a_measured_step():
    config = TrainingConfig(encoder=EncoderConfig(preset="tiny"))
    budget = pretraining_budget(config, _SMALL)
    plain = dict(budget_table(budget, 64, 32, 7200))
    assert plain["steps"] == "7,200"
    assert (plain["clips per device"], plain["clips at once"]) == ("64", "32")
    gib = (budget.bytes_fixed + 32 * budget.bytes_per_clip) / 2**30
    assert plain["memory per device"] == f"{gib:,.2f} GiB"
    assert "estimated time" not in plain
    assert dict(budget_table(budget, 64, 32, 7200, 0.5))["estimated time"] == "1.0 h"
