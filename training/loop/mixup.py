"""Mixup: every clip of a global batch meets another one, as if their sounds were played together.

Knows nothing of classifiers or losses. Invariants: who meets whom, and how loud, depends on the
seed and the step alone, so it is the same for any number of workers and lanes; nobody meets itself.

Shapes: B clips of the global batch, n of this rank, T fbank frames, M mel bins, C classes.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.augment import normalise_frames
from training.data.device import DeviceBatch, to_device
from training.losses.gather import RankShare, gather_with_grad

_BETA = 10.0
"""Beta(10, 10) of CAV-MAE's mixup."""


class Meeting(NamedTuple):
    """Who meets whom in a global batch."""

    partner_B: NDArray[np.int64]
    """Position of the other clip; no clip is its own."""
    own_B: NDArray[np.float32]
    """Amplitude of the clip itself, lambda; 1 where it is left alone."""


class Mixed(NamedTuple):
    """This rank's clips after they met others."""

    fbank_nTM: Tensor
    """float32, log power, not normalised."""
    frames_nFCHW: Tensor
    """float32, normalised."""
    targets_nC: Tensor
    is_alone_n: Tensor
    """Which of them met nobody, bool."""


def meeting(n_clips: int, chance: float, *seeds: int) -> Meeting:
    """Draw who meets whom. Args: chance: that a clip is mixed at all. seeds: of the run and step.

    Everybody stands in one ring in random order and meets the next.
    """
    rng = np.random.default_rng([*seeds, 0x313])
    ring_B = rng.permutation(n_clips)
    partner_B = np.empty(n_clips, np.int64)
    partner_B[ring_B] = np.roll(ring_B, -1)
    own_B = rng.beta(_BETA, _BETA, n_clips)
    own_B = np.where(rng.random(n_clips) < chance, own_B, 1.0)
    return Meeting(partner_B, own_B.astype(np.float32))


def mix(batch: DeviceBatch, targets_nC: Tensor, met: Meeting, share: RankShare) -> Mixed:
    """Sounds, pictures and targets of the clips that meet, by one lambda each. Collective.

    Partners of other ranks come as they are stored: a clip is about 0.4 MB.
    """
    device = targets_nC.device
    mine = slice(share.first, share.first + len(targets_nC))
    partner_n = to_device(met.partner_B[mine], device)
    own_n = to_device(met.own_B[mine], device)
    stored = (batch.fbank_nTM, batch.frames_nFHWC, targets_nC)
    fbank, frames, targets = (gather_with_grad(x, share)[partner_n] for x in stored)
    own_n1, own_n1111 = own_n.view(-1, 1), own_n.view(-1, 1, 1, 1, 1)
    pictures = own_n1111 * normalise_frames(batch.frames_nFHWC)
    pictures = pictures + (1 - own_n1111) * normalise_frames(frames)
    return Mixed(
        mix_fbanks(batch.fbank_nTM, fbank, own_n),
        pictures,
        own_n1 * targets_nC + (1 - own_n1) * targets,
        own_n == 1,
    )


def mix_fbanks(fbank_nTM: Tensor, other_nTM: Tensor, own_n: Tensor) -> Tensor:
    """The fbank of `own` * sound + (1 - own) * other sound, from their fbanks: float32 [n, T, M].

    Powers of unrelated sounds add, and go with the square of an amplitude: hence 2 log(lambda).
    Beyond its own end a clip stays padding, as where CAV-MAE cuts the other sound to its length.
    """
    own_n11 = own_n.view(-1, 1, 1)
    x_nTM, y_nTM = fbank_nTM.float(), other_nTM.float()
    # The log of no power: padding is stored as zeros, which would be the log of a loud sound.
    silence = torch.full_like(y_nTM, -torch.inf)
    y_nTM = torch.where(_valid(other_nTM), y_nTM, silence)
    mixed_nTM = torch.logaddexp(x_nTM + 2 * own_n11.log(), y_nTM + 2 * (1 - own_n11).log())
    return torch.where(_valid(fbank_nTM), mixed_nTM, x_nTM)


def _valid(fbank_nTM: Tensor) -> Tensor:
    """Which fbank frames hold sound, bool [n, T, 1]: padding is exactly zero in every mel bin."""
    return (fbank_nTM != 0).any(2, keepdim=True)
