"""Random crops of a batch of frames, against torch's own functions for the same samples.

Bytes as a store has them to the normalised view that a stem takes; nothing but the crop, which is
where the time goes. The peer normalises frames as they lie and samples at `affine_grid`'s places.
Printed: milliseconds of both, in turns, the ratio of the medians, and the largest difference.

    python benchmarks/views.py --threads 2 --clips 32 --size 96
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from training.config import AugmentConfig
from training.data.augment import IMAGENET_MEAN, IMAGENET_STD, augment_frames, normalise_frames
from training.model.cpu import use_cpu

_CROP = AugmentConfig(crop_scale_min=0.6, brightness=0.0, contrast=0.0)
_WARM = 5


def ours(frames_BFHWC: Tensor) -> Tensor:
    """The view, by seed 0."""
    draws = torch.Generator().manual_seed(0)
    return augment_frames(normalise_frames(frames_BFHWC), _CROP, draws)


def peer(frames_BFHWC: Tensor) -> Tensor:
    """The same view, of the same draws."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x_BCHW = (frames_BFHWC.permute(0, 1, 4, 2, 3).float() / 255.0 - mean).div(std).flatten(0, 1)
    draws, n = torch.Generator().manual_seed(0), len(x_BCHW)
    low = _CROP.crop_scale_min
    scale = (torch.rand(n, generator=draws) * (1.0 - low) + low).sqrt()
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    for axis in (0, 1):
        theta[:, axis, 2] = (torch.rand(n, generator=draws) * 2.0 - 1.0) * (1.0 - scale)
    grid = functional.affine_grid(theta, list(x_BCHW.shape), align_corners=False)
    view = functional.grid_sample(x_BCHW, grid, padding_mode="border", align_corners=False)
    return view.unsqueeze(1)


def milliseconds(make: Callable[[Tensor], Tensor], frames: Tensor) -> float:
    """Of one call."""
    began = time.perf_counter()
    make(frames)
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    """Both in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clips", type=int, default=32, help="of a lane")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    use_cpu(args.threads)
    shape = (args.clips, 1, args.size, args.size, 3)
    frames = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).byte()
    times: dict[Callable[[Tensor], Tensor], list[float]] = {ours: [], peer: []}
    for i in range(_WARM + args.rounds):
        for make, of_it in times.items():
            took = milliseconds(make, frames)
            if i >= _WARM:
                of_it.append(took)
    here, there = (statistics.median(of_it) for of_it in times.values())
    apart = (ours(frames) - peer(frames)).abs().max()
    print(f"ours {here:.2f} ms  peer {there:.2f} ms  ratio {here / there:.2f}  apart {apart:.1e}")


if __name__ == "__main__":
    main()
