"""augment_fbank, augment_frames: stored features to model input, with or without random views.

Pure tensors and explicit generators of their device: knows nothing of stores, lanes or Ray.
Invariant: the same generator state gives the same view, however many devices share the batch.

Shapes: B clips, F frames, H x W pixels, T fbank frames, M mel bins.
"""

import functools
import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from training.config import AugmentConfig, DataConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
"""RGB to luma Y and chroma (I, Q), as NTSC defines them; a grey pixel has no chroma."""


def normalise_frames(frames_BFHWC: Tensor) -> Tensor:
    """uint8 RGB [B, F, H, W, 3] -> float32 [B, F, 3, H, W] with ImageNet statistics."""
    # Laid out as its shape says while it is bytes: what follows would go by threes of colours.
    x = frames_BFHWC.permute(0, 1, 4, 2, 3).contiguous().float() / 255.0
    mean, std = _imagenet(x.device)
    return (x - mean) / std


@functools.lru_cache(maxsize=8)
def _yiq(device: torch.device) -> tuple[Tensor, Tensor]:
    """YIQ and its inverse, [3, 3]; copied once, as that waits."""
    to_yiq = torch.tensor(YIQ, dtype=torch.float64)
    return to_yiq.float().to(device), to_yiq.inverse().float().to(device)


@functools.lru_cache(maxsize=8)
def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each colour, [3, 1, 1]; copied once, as that waits."""
    values = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    mean, std = values
    return mean, std


def normalise_fbank(fbank_BTM: Tensor, data: DataConfig) -> Tensor:
    """Stored fbank, any float dtype [B, T, M] -> float32, zero mean and unit variance."""
    mean, std = data.statistics
    return (fbank_BTM.float() - mean) / std


def _uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device) * (high - low) + low


def augment_frames(x_BFCHW: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    """Random resized crop, flip, contrast, brightness, colour, blur; one draw for a clip's frames.

    Contrast multiplies the normalised values, brightness is added to them; the rest is `_recolour`
    and `_blur`. A strength of 0 draws nothing, so the views of a config stay what they were when a
    new kind of change is added to this file.

    Args: x_BFCHW: normalised float32, on the generator's device.
    """
    n_clips = len(x_BFCHW)
    draws = {
        "scale": _uniform(n_clips, config.crop_scale_min, 1.0, generator).sqrt(),
        "dx": _uniform(n_clips, -1.0, 1.0, generator),
        "dy": _uniform(n_clips, -1.0, 1.0, generator),
        "flip": torch.where(_uniform(n_clips, 0.0, 1.0, generator) < config.flip, -1.0, 1.0),
        "brightness": _uniform(n_clips, -config.brightness, config.brightness, generator),
        "contrast": 1.0 + _uniform(n_clips, -config.contrast, config.contrast, generator),
    }
    if config.crop_scale_min < 1.0 or config.flip > 0.0:
        away = 1.0 - draws["scale"]
        xs_BW = _places(draws["scale"] * draws["flip"], draws["dx"] * away, x_BFCHW.shape[4])
        ys_BH = _places(draws["scale"], draws["dy"] * away, x_BFCHW.shape[3])
        x_BFCHW = _sampled(x_BFCHW, xs_BW, ys_BH)
    shape = (n_clips, 1, 1, 1, 1)
    x_BFCHW = x_BFCHW * draws["contrast"].view(shape) + draws["brightness"].view(shape)
    if config.hue > 0.0 or config.saturation > 0.0 or config.greyscale > 0.0:
        x_BFCHW = _recolour(x_BFCHW, config, generator)
    if config.blur > 0.0:
        x_BFCHW = _blur(x_BFCHW, _uniform(n_clips, 0.0, config.blur, generator))
    return x_BFCHW


def _places(scale_B: Tensor, offset_B: Tensor, n: int) -> Tensor:
    """Where a crop samples one axis of n pixels: [B, n], in which the axis goes from -1 to 1."""
    centres = torch.linspace(-1.0, 1.0, n, device=scale_B.device) * (n - 1) / n
    return centres * scale_B[:, None] + offset_B[:, None]


def _sampled(x_BFCHW: Tensor, xs_BW: Tensor, ys_BH: Tensor) -> Tensor:
    """Bilinear samples at every pair of a row's and a column's place, the same in all frames."""
    # By axis: `affine_grid`, a matrix product for each pixel, took a CPU thrice the time of it.
    axes = torch.broadcast_tensors(xs_BW[:, None, :], ys_BH[:, :, None])
    grid = torch.stack(axes, dim=-1).repeat_interleave(x_BFCHW.shape[1], 0)
    flat = F.grid_sample(x_BFCHW.flatten(0, 1), grid, padding_mode="border", align_corners=False)
    return flat.view_as(x_BFCHW)


def _recolour(x_BFCHW: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    """Turn and scale the chroma of every pixel; its luma stays.

    Of a pixel's RGB in [0, 1], (Y, I, Q) = YIQ RGB; the chroma (I, Q) is rotated by an angle
    uniform in +-hue * 360 degrees and multiplied by a factor uniform in 1 +- saturation, or by 0
    with chance `greyscale`. Nothing is clipped to [0, 1] on the way back: clipping would change
    the luma, and leave a trace of the hue that was.
    """
    n_clips, device = len(x_BFCHW), x_BFCHW.device
    angle = _uniform(n_clips, -config.hue, config.hue, generator) * (2 * math.pi)
    factor = 1.0 + _uniform(n_clips, -config.saturation, config.saturation, generator)
    grey = _uniform(n_clips, 0.0, 1.0, generator) < config.greyscale
    factor = torch.where(grey, 0.0, factor)
    chroma_B33 = torch.zeros(n_clips, 3, 3, device=device)
    chroma_B33[:, 0, 0] = 1.0
    chroma_B33[:, 1, 1] = chroma_B33[:, 2, 2] = factor * angle.cos()
    chroma_B33[:, 2, 1] = factor * angle.sin()
    chroma_B33[:, 1, 2] = -chroma_B33[:, 2, 1]
    to_yiq, to_rgb = _yiq(device)
    rgb_B33 = to_rgb @ chroma_B33 @ to_yiq
    mean, std = (values.flatten() for values in _imagenet(device))
    # Of normalised values: one product for each pixel instead of one more for every step.
    matrix_B33 = rgb_B33 * std / std[:, None]
    offset_B3 = (rgb_B33 @ mean - mean) / std
    changed = matrix_B33[:, None] @ x_BFCHW.flatten(3) + offset_B3[:, None, :, None]
    return changed.view_as(x_BFCHW)


def _blur(x_BFCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Gaussian blur of `sigma_B` pixels along both axes; weights of a row of pixels sum to 1.

    The part of a Gaussian that is outside of the frame is shared out among the pixels inside. As
    products of whole rows with a matrix: a convolution has one kernel size, and each clip a width
    of its own.
    """

    def weights(n: int) -> Tensor:
        at = torch.arange(n, device=x_BFCHW.device)
        distance = (at[:, None] - at) / sigma_B.clamp_min(1e-3)[:, None, None]
        return torch.softmax(-0.5 * distance**2, dim=-1)[:, None, None]

    height, width = x_BFCHW.shape[-2:]
    return weights(height) @ x_BFCHW @ weights(width).mT


def _random_spans(n: int, length: int, longest: int, generator: Generator) -> Tensor:
    """Boolean [n, length], True inside one random span of at most `longest`."""
    width = _uniform(n, 0.0, longest + 1, generator).floor().clamp(max=longest)
    start = (_uniform(n, 0.0, 1.0, generator) * (length - width + 1).clamp(min=1)).floor()
    index = torch.arange(length, device=generator.device)
    return (index >= start[:, None]) & (index < (start + width)[:, None])


def augment_fbank(
    fbank_BTM: Tensor, config: AugmentConfig, data: DataConfig, generator: Generator
) -> Tensor:
    """Gain, SpecAugment masks, noise and circular shift.

    Noise and shift are CAV-MAE's: uniform in [0, level), level uniform in [0, fbank_noise).

    Args: fbank_BTM: stored values. Returns: normalised float32 [B, T, M].
    """
    n_clips, n_frames, n_mels = fbank_BTM.shape
    device = fbank_BTM.device
    x_BTM = fbank_BTM.float()
    freq = _random_spans(n_clips, n_mels, config.freq_mask, generator)
    time = _random_spans(n_clips, n_frames, config.time_mask, generator)
    gain = _uniform(n_clips, -config.gain, config.gain, generator)
    level = _uniform(n_clips, 0.0, config.fbank_noise, generator)
    longest = int(config.shift_frac * n_frames)
    shift = _uniform(n_clips, -longest, longest + 1, generator).floor().long()
    if config.gain:
        x_BTM = x_BTM + gain[:, None, None]
    if config.freq_mask or config.time_mask:
        fill = data.statistics.mean if config.mask_with == "mean" else 0.0
        x_BTM = x_BTM.masked_fill(freq[:, None, :] | time[:, :, None], fill)
    x_BTM = normalise_fbank(x_BTM, data)
    if config.fbank_noise:
        noise = torch.rand(x_BTM.shape, generator=generator, device=device)
        x_BTM = x_BTM + noise * level[:, None, None]
    if longest:
        index = (torch.arange(n_frames, device=device)[None] - shift[:, None]) % n_frames
        x_BTM = x_BTM[torch.arange(n_clips, device=device)[:, None], index]
    return x_BTM
