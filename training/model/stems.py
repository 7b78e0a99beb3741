"""AudioConvStem and VideoConvStem: fbank or frame to a few tokens, trainable from nothing on a CPU.

Know nothing of positions, modalities or losses. Invariant: no statistics over the batch, so a
clip's tokens never depend on its neighbours or on the number of workers.

Plain 16x16 patches do not leave the InfoNCE plateau ln B without pretrained weights; these do.

Shapes: B clips, T fbank frames, M mel bins, L tokens, D width.
"""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.model.blocks import PATCH, Cells
from training.model.numerics import convolution_numerics

_AUDIO_CHANNELS = (32, 64, 128)
_VIDEO_CHANNELS = (16, 32, 64, 128)


_RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))
"""1 / the standard deviation of a ReLU of unit normal values."""

Norm = Literal["group", "weights", "first"]


class StandardisedConv2d(nn.Conv2d):
    """Convolution whose filters have mean 0 and variance 1 / fan-in, before a gain that is learnt.

    Unit variance goes through a layer without a look at the activations, so nothing of a clip, such
    as its contrast or colour, is normalised away.
    Source: scaled weight standardisation, Brock et al. 2021 (arXiv 2101.08692).
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, input_gain: float) -> None:
        """Args: input_gain: 1 / the standard deviation of the inputs."""
        super().__init__(c_in, c_out, kernel, stride, kernel // 2)
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        self.gain = nn.Parameter(torch.ones(c_out))
        self._scale = input_gain / math.sqrt(self.weight[0].numel())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """As nn.Conv2d."""
        weight = self.weight
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
        gain = (self.gain * self._scale)[:, None, None, None]
        standardised = (weight - mean) * torch.rsqrt(variance + 1e-8) * gain
        return F.conv2d(x_BCHW, standardised, self.bias, self.stride, self.padding)


def _conv(
    c_in: int,
    c_out: int,
    norm: Norm,
    *,
    kernel: int = 3,
    stride: int = 1,
    first: bool = False,
    pooled: bool = False,
) -> list[nn.Module]:
    """Convolution, norm and ReLU.

    Args: first: of the stem, whose input is no ReLU's. pooled: half the map, by maxima.
    """
    layers: list[nn.Module] = []
    if norm == "group":
        layers.append(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False))
    else:
        gain = 1.0 if first else _RELU_GAIN
        layers.append(StandardisedConv2d(c_in, c_out, kernel, stride, gain))
    if norm == "group" or (norm == "first" and first):
        layers.append(nn.GroupNorm(8, c_out))
    # The largest of four, then the ReLU: the numbers of the other order, for a quarter of it.
    pool = [nn.MaxPool2d(2)] if pooled else []
    return [*layers, *pool, nn.ReLU(inplace=True)]


def _laid_out(x_BCHW: Tensor, norm: Norm) -> Tensor:
    """Channels last in memory, which is a third less time on a CPU.

    But not with GroupNorm, whose backward pass then takes twice as long.
    """
    if norm != "weights":
        return x_BCHW
    # Not `contiguous`: of one channel it says that either layout is there already.
    order = (0, 2, 3, 1)
    last = torch.empty_permuted(x_BCHW.shape, order, dtype=x_BCHW.dtype, device=x_BCHW.device)
    return last.copy_(x_BCHW)


class AudioConvStem(nn.Module):
    """fbank to tokens, one per 16 fbank frames with all mel bins in it."""

    def __init__(self, dim: int, n_mels: int, fbank_frames: int, norm: Norm = "group") -> None:
        super().__init__()
        # stride 4 at once: at stride 2 the first layer alone was half of a CPU step
        layers = _conv(1, _AUDIO_CHANNELS[0], norm, kernel=5, stride=4, first=True)
        for a, b in itertools.pairwise(_AUDIO_CHANNELS):
            layers += _conv(a, b, norm, stride=2)
        self.norm, self.blocks = norm, nn.Sequential(*layers)
        self.n_tokens = math.ceil(fbank_frames / PATCH)
        self.cells = Cells((1, self.n_tokens), (n_mels, PATCH))
        self.proj = nn.Linear(_AUDIO_CHANNELS[-1] * math.ceil(n_mels / 16), dim)

    def forward(self, fbank_BTM: Tensor) -> Tensor:
        """fbank_BTM [B, T, M] float, normalised -> [B, L, D]."""
        with convolution_numerics(fbank_BTM.device):
            x_BCtm = self.blocks(_laid_out(fbank_BTM.unsqueeze(1), self.norm))
        tokens_BLD: Tensor = self.proj(x_BCtm.transpose(1, 2).flatten(2))
        return tokens_BLD


class VideoConvStem(nn.Module):
    """Frame to tokens, one per 32x32 pixels; sees the half-size picture and its local contrast."""

    def __init__(self, dim: int, frame_size: int, norm: Norm = "group") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise((6, *_VIDEO_CHANNELS[:-1])):
            layers += _conv(a, b, norm, first=not layers, pooled=True)
        layers += _conv(*_VIDEO_CHANNELS[-2:], norm, stride=2)
        self.norm, self.blocks = norm, nn.Sequential(*layers)
        side = math.ceil(frame_size // 16 / 2)
        self.n_tokens = side**2
        self.cells = Cells((side, side), (32, 32))
        self.proj = nn.Linear(_VIDEO_CHANNELS[-1], dim)

    def forward(self, frames_BCHW: Tensor) -> Tensor:
        """frames_BCHW [B, 3, H, W] float, normalised -> [B, L, D]."""
        half = F.avg_pool2d(frames_BCHW, 2)
        around = F.avg_pool2d(half, 8, ceil_mode=True)
        around = F.interpolate(around, size=half.shape[-2:], mode="bilinear")
        with convolution_numerics(frames_BCHW.device):
            x_BChw = self.blocks(_laid_out(torch.cat([half, half - around], dim=1), self.norm))
        tokens_BLD: Tensor = self.proj(x_BChw.flatten(2).transpose(1, 2))
        return tokens_BLD
