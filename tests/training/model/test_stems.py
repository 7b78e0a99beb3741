"""Conv stems: what standardised filters are, and that no norm makes clips depend on each other."""

from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from training.config import EncoderConfig
from training.model.stems import AudioConvStem, Norm, StandardisedConv2d, VideoConvStem

every_norm = pytest.mark.parametrize("norm", get_args(Norm))


def test_the_config_names_the_norms_there_are() -> None:
    assert EncoderConfig.model_fields["norm"].annotation == Norm
    assert EncoderConfig().norm == "group", "saved encoders without the key have GroupNorm"


@every_norm
def test_a_clip_has_the_same_tokens_among_any_neighbours(norm: Norm) -> None:
    torch.manual_seed(0)
    for stem, shape in (
        (AudioConvStem(16, 32, 48, norm), (6, 48, 32)),
        (VideoConvStem(16, 32, norm), (6, 3, 32, 32)),
    ):
        clips = torch.randn(shape)
        alone = stem.double()(clips[:1].double())
        torch.testing.assert_close(stem(clips.double())[:1], alone)


def test_filters_are_standardised_whatever_their_weights() -> None:
    torch.manual_seed(0)
    layer = StandardisedConv2d(4, 8, 3, 1, input_gain=1.0)
    x = torch.randn(64, 4, 16, 16)
    before = layer(x)
    assert abs(float(before[:, :, 1:-1, 1:-1].detach().var()) - 1) < 0.05
    weight = layer.weight.detach()
    mean, std = (f(dim=(1, 2, 3), keepdim=True) for f in (weight.mean, weight.std))
    filters = (weight - mean) / std / (35 / 36) ** 0.5 / 6  # std has n - 1, and the fan-in is 36.
    torch.testing.assert_close(before, F.conv2d(x, filters, padding=1), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        layer.weight.mul_(7).add_(0.3)
        torch.testing.assert_close(layer(x), before, atol=1e-4, rtol=1e-3)
        layer.gain.mul_(2)
    assert not torch.allclose(layer(x), before, atol=0.1), "the gain is no part of it"


def test_standardised_weights_leave_contrast_in_and_group_norm_takes_it_out() -> None:
    torch.manual_seed(0)
    frames = torch.randn(4, 3, 32, 32)
    for norm, is_seen in (("group", False), ("weights", True), ("first", False)):
        stem = VideoConvStem(16, 32, norm)
        tokens, dim = stem(frames), stem(0.5 * frames)
        assert (float((tokens - dim).detach().abs().max()) > 0.05) == is_seen, norm
