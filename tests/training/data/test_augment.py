"""Random views of frames: literal references pixel by pixel, bounds, and what 0 leaves alone."""

import colorsys
import math
from pathlib import Path

import pytest
import torch
from support.trainers import make_trainer, pretrain_config
from torch import Tensor
from torch.nn import functional

from training.config import AugmentConfig
from training.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    YIQ,
    augment_frames,
    normalise_frames,
)
from training.data.device import DeviceBatch
from training.data.views import Chunk, step_generator

N_CLIPS, N_FRAMES, SIZE = 64, 2, 9
CPU = torch.device("cpu")


def frames() -> Tensor:
    shape = (N_CLIPS, N_FRAMES, SIZE, SIZE, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3)).byte()


def view_of(x_BFHWC: Tensor, seed: int = 0, **strengths: float) -> Tensor:
    """RGB in [0, 1] of a view, float64 [B, F, H, W, 3]."""
    config = AugmentConfig(**strengths)
    x = augment_frames(normalise_frames(x_BFHWC), config, step_generator(seed, device=CPU))
    return x.double().permute(0, 1, 3, 4, 2) * torch.tensor(IMAGENET_STD) + torch.tensor(
        IMAGENET_MEAN
    )


def chroma_of(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Luma, and chroma as complex numbers."""
    y, i, q = (rgb @ torch.tensor(YIQ, dtype=torch.float64).T).unbind(-1)
    return y, torch.complex(i, q)


@pytest.mark.parametrize(
    "strengths", [{"hue": 0.5}, {"saturation": 1.0}, {"hue": 0.1, "saturation": 0.4}]
)
def test_colour_is_one_rotation_and_factor_of_a_clips_chroma(strengths: dict[str, float]) -> None:
    before = frames()
    after = view_of(before, **strengths)
    luma, chroma = chroma_of(before.double() / 255)
    new_luma, new_chroma = chroma_of(after)
    torch.testing.assert_close(new_luma, luma, atol=1e-5, rtol=0)
    for clip in range(N_CLIPS):
        brightest = chroma[clip].abs().flatten().argmax()
        change = new_chroma[clip].flatten()[brightest] / chroma[clip].flatten()[brightest]
        for pixel, new_pixel in zip(
            chroma[clip].flatten(), new_chroma[clip].flatten(), strict=True
        ):
            assert abs(complex(pixel * change - new_pixel)) < 1e-4
        assert (
            abs(math.atan2(change.imag, change.real))
            <= 2 * math.pi * strengths.get("hue", 0.0) + 1e-4
        )
        assert abs(abs(complex(change)) - 1) <= strengths.get("saturation", 0.0) + 1e-4


def test_any_hue_means_the_whole_circle() -> None:
    red = torch.zeros(N_CLIPS, 1, 1, 1, 3, dtype=torch.uint8)
    red[..., 0] = 200
    hues = [
        colorsys.rgb_to_hsv(*pixel.flatten().clamp(0, 1).tolist())[0]
        for pixel in view_of(red, hue=0.5)
    ]
    assert {int(6 * hue) for hue in hues} == set(range(6))
    near = [
        colorsys.rgb_to_hsv(*pixel.flatten().clamp(0, 1).tolist())[0]
        for pixel in view_of(red, hue=0.05)
    ]
    assert all(min(hue, 1 - hue) < 0.15 for hue in near)


def test_greyscale_leaves_the_luma_alone_in_its_share_of_views() -> None:
    before = frames()
    luma = (before.double() / 255) @ torch.tensor(YIQ[0], dtype=torch.float64)
    after = view_of(before, greyscale=1.0)
    torch.testing.assert_close(after, luma[..., None].expand_as(after), atol=1e-5, rtol=0)
    some = view_of(before, greyscale=0.3)
    grey_B = (some.amax(-1) - some.amin(-1)).flatten(1).amax(1) < 1e-5
    torch.testing.assert_close(some[~grey_B], before.double()[~grey_B] / 255, atol=1e-5, rtol=0)
    assert 0.1 < grey_B.double().mean() < 0.5


def test_blur_is_a_gaussian_mean_of_pixels_no_wider_than_told() -> None:
    point = torch.zeros(N_CLIPS, 1, SIZE, SIZE, 3, dtype=torch.uint8)
    point[:, :, 4, 4] = 255
    after = view_of(point, blur=1.5)
    for clip in range(N_CLIPS):
        line = after[clip, 0, :, 4, 0]
        ratio = float(line[3] / line[4])
        # The row of pixel 3 has one pixel less on its left than that of pixel 4: another sum.
        sigma = _sigma_that_gives(ratio)
        assert 0 <= sigma <= 1.5 + 1e-3
        want = _blurred(point[clip, 0, :, :, 0].double() / 255, sigma)
        torch.testing.assert_close(after[clip, 0, ..., 0], want, atol=2e-4, rtol=0)
    flat = torch.full((4, 1, SIZE, SIZE, 3), 77, dtype=torch.uint8)
    torch.testing.assert_close(view_of(flat, blur=3.0), flat.double() / 255, atol=1e-5, rtol=0)


def _weights(at: int, sigma: float) -> list[float]:
    raw = [math.exp(-((at - other) ** 2) / (2 * sigma**2)) for other in range(SIZE)]
    return [value / sum(raw) for value in raw]


def _blurred(x_HW: Tensor, sigma: float) -> Tensor:
    weights = torch.tensor([_weights(i, sigma) for i in range(SIZE)], dtype=torch.float64)
    return torch.einsum("ia,jb,ab->ij", weights, weights, x_HW)


def _sigma_that_gives(ratio: float) -> float:
    low, high = 0.05, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        found = _weights(3, middle)[4] / _weights(4, middle)[4]
        low, high = (middle, high) if found < ratio else (low, middle)
    return low


def test_strengths_of_zero_leave_other_views_and_later_draws_as_they_were() -> None:
    x = normalise_frames(frames())
    assert torch.equal(augment_frames(x, AugmentConfig(), step_generator(1, device=CPU)), x)
    old = AugmentConfig(crop_scale_min=0.5, flip=0.5, brightness=0.2, contrast=0.2)
    new = old.model_copy(update={"hue": 0.2, "blur": 1.0})
    generator = step_generator(1, device=CPU)
    first = augment_frames(x, old, generator)
    # 6 draws of a clip, no more: what follows them in a run of before is what it was.
    again = step_generator(1, device=CPU)
    torch.rand(6, N_CLIPS, generator=again)
    assert torch.equal(torch.rand(9, generator=generator), torch.rand(9, generator=again))
    assert not torch.equal(first, augment_frames(x, new, step_generator(1, device=CPU)))


def test_a_clip_is_seen_the_same_whichever_worker_and_chunk_it_is_in(tmp_path: Path) -> None:
    strong = {"hue": 0.5, "saturation": 0.5, "greyscale": 0.3, "blur": 1.0}
    whole = _chunks(pretrain_config(augment=strong), tmp_path / "a")
    parts = _chunks(pretrain_config(augment=strong, pretrain={"micro_batch": 4}), tmp_path / "b")
    plain = _chunks(pretrain_config(), tmp_path / "c")
    assert (len(whole), len(parts)) == (1, 4)
    for view in range(len(whole[0].views)):
        together = torch.cat([chunk.views[view].frames_nFCHW for chunk in parts])
        assert torch.equal(whole[0].views[view].frames_nFCHW, together)
    assert not torch.equal(whole[0].views[0].frames_nFCHW, plain[0].views[0].frames_nFCHW)


def _chunks(config, folder: Path) -> list[Chunk]:
    """Chunks of the first step of a run."""
    trainer, _ = make_trainer(config, folder, rounds=False)
    seen: list[list[Chunk]] = []
    made = trainer.chunks.of

    def of(batch: DeviceBatch, epoch: int, step: int) -> list[Chunk]:
        seen.append(made(batch, epoch, step))
        return seen[-1]

    trainer.chunks.of = of  # type: ignore[method-assign]
    trainer.run(until_epoch=1)
    return seen[0]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_crop_is_an_affine_map_of_all_frames_of_a_clip(flip: float) -> None:
    config = AugmentConfig(crop_scale_min=0.3, flip=flip, brightness=0.0, contrast=0.0)
    frames_BFCHW = torch.rand(5, 3, 3, 48, 36)
    seen = augment_frames(frames_BFCHW, config, torch.Generator().manual_seed(3))

    draws = torch.Generator().manual_seed(3)
    scale_B = (torch.rand(5, generator=draws) * 0.7 + 0.3).sqrt()
    dx_B, dy_B = (torch.rand(5, generator=draws) * 2 - 1 for _ in range(2))
    theta_B23 = torch.zeros(5, 2, 3)
    theta_B23[:, 0, 0] = scale_B * (-1 if flip else 1)
    theta_B23[:, 1, 1] = scale_B
    theta_B23[:, 0, 2] = dx_B * (1 - scale_B)
    theta_B23[:, 1, 2] = dy_B * (1 - scale_B)
    grid_BHW2 = functional.affine_grid(theta_B23, [5, 3, 48, 36], align_corners=False)
    for f in range(3):
        expected = functional.grid_sample(
            frames_BFCHW[:, f], grid_BHW2, padding_mode="border", align_corners=False
        )
        torch.testing.assert_close(seen[:, f], expected, rtol=0, atol=1e-6)
