"""ChunkMaker: a decoded batch to augmented chunks of views, the same whatever worker holds a lane.

Pure tensors: knows nothing of losses or stores. Invariant: every lane of every step has random
numbers of its own, so views do not depend on the number of workers or on the size of a chunk.

Shapes: b clips of a lane, n of a chunk, F frames of a view, T fbank frames, M mel bins.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.config import TrainingConfig
from training.data.augment import augment_fbank, augment_frames, normalise_frames
from training.data.device import DeviceBatch
from training.data.order import BatchPlan
from training.errors import TrainingError
from training.model.encoder import Encoder, MaskNoise


class View(NamedTuple):
    """One random view of some clips, normalised."""

    fbank_nTM: Tensor
    frames_nFCHW: Tensor


class Chunk(NamedTuple):
    """Some whole lanes of a batch."""

    views: list[View]
    """One, or two with intra-modal losses; the same clips in each."""
    masks: MaskNoise | None
    """What hides their tokens, when masking is on."""


class ChunkMaker:
    """Cuts batches of this worker into chunks of at most `pretrain.micro_batch` clips.

    Raises: TrainingError if a single lane is larger than that.
    """

    def __init__(
        self,
        config: TrainingConfig,
        encoder: Encoder,
        plan: BatchPlan,
        lanes: range,
        device: torch.device,
    ) -> None:
        self.config, self.encoder, self.lanes, self.device = config, encoder, lanes, device
        self.lane_size = plan.lane_size
        micro_batch = config.pretrain.micro_batch or len(lanes) * self.lane_size
        if micro_batch < self.lane_size:
            raise TrainingError(
                f"pretrain.micro_batch = {micro_batch} is smaller than a lane of "
                f"{self.lane_size} clips (batch_size / data.lanes); raise it, or data.lanes"
            )
        self.lanes_per_chunk = micro_batch // self.lane_size

    def of(self, batch: DeviceBatch, epoch: int, step: int) -> list[Chunk]:
        """All clips of the batch, augmented, in their order."""
        made = [self._lane(batch, i, epoch, step) for i in range(len(self.lanes))]
        m = self.lanes_per_chunk
        return [_join(made[i : i + m]) for i in range(0, len(made), m)]

    def _lane(self, batch: DeviceBatch, i: int, epoch: int, step: int) -> Chunk:
        config = self.config
        rows = slice(i * self.lane_size, (i + 1) * self.lane_size)
        seeds = (config.seed, epoch, step, self.lanes[i])
        generator = step_generator(*seeds, device=self.device)
        fbank, frames = batch.fbank_nTM[rows], batch.frames_nFHWC[rows]
        F = config.data.frames_per_clip
        views = [
            View(
                augment_fbank(fbank, config.augment, config.data, generator),
                augment_frames(normalise_frames(part), config.augment, generator),
            )
            for part in frames.split(F, dim=1)
        ]
        if config.loss.reconstruction == 0:
            return Chunk(views, None)
        audio, video = (
            torch.rand(len(fbank), n, generator=generator, device=self.device)
            for n in self.encoder.token_counts(F)
        )
        return Chunk(views, MaskNoise(audio, video, config.loss.mask_ratio))


def _join(lanes: list[Chunk]) -> Chunk:
    by_view = zip(*(lane.views for lane in lanes), strict=True)
    views = [View(*(torch.cat(part) for part in zip(*same, strict=True))) for same in by_view]
    masks = [lane.masks for lane in lanes if lane.masks is not None]
    if not masks:
        return Chunk(views, None)
    audio = torch.cat([mask.audio_BL for mask in masks])
    video = torch.cat([mask.video_BL for mask in masks])
    return Chunk(views, MaskNoise(audio, video, masks[0].mask_ratio))


def step_generator(*parts: int, device: torch.device) -> torch.Generator:
    """Random numbers that depend on these integers, and the kind of device, alone.

    On the device itself: the noise of 32 clips took a CPU 20 ms, half of a GPU's whole step.
    """
    seed = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed) & (2**63 - 1))
