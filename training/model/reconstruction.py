"""Decoder and masking: masked reconstruction, L_rec, as in CAV-MAE, of cells that were hidden.

Pure modules: knows nothing of how noise is drawn or how the loss is weighted.
Invariant: masks come from explicit noise, so a chunk of a batch can be run again; the loss is
CAV-MAE's although the decoder keeps tokens in shuffled order (attention does not see the order)
and predicts hidden cells only; a cell is a patch, or what a conv stem's token stands for.

Shapes: B clips, L tokens of a modality, N kept tokens of both, D / E encoder / decoder width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.config import EncoderConfig
from training.model.blocks import (
    Block,
    Cells,
    frame_positions,
    full_precision,
    initialise_linears,
    sincos_2d,
)


class Masking(NamedTuple):
    """Which tokens of each clip are kept and which are hidden; indices int64."""

    keep: Tensor
    """[B, L_keep], in the order of their noise."""
    hidden: Tensor
    """[B, L - L_keep]."""


def masking_from_noise(noise_BL: Tensor, mask_ratio: float) -> Masking:
    """Keep the L * (1 - mask_ratio) tokens of smallest noise in each row, rounded down, at least 1.

    Raises: ValueError if mask_ratio is not in [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio = {mask_ratio}: need 0 <= mask_ratio < 1")
    order = torch.argsort(noise_BL, dim=1, stable=True)
    # 1e-6: 10 * (1 - 0.9) is a little less than 1
    n_keep = max(1, int(noise_BL.shape[1] * (1 - mask_ratio) + 1e-6))
    return Masking(order[:, :n_keep], order[:, n_keep:])


def take_tokens(x_BLD: Tensor, index_BN: Tensor) -> Tensor:
    """The indexed tokens of each row: [B, L, D], [B, N] -> [B, N, D]; [1, L, D] is shared."""
    index = index_BN[..., None].expand(-1, -1, x_BLD.shape[-1])
    return x_BLD.expand(index_BN.shape[0], -1, -1).gather(1, index)


class Decoder(nn.Module):
    """Fusion tokens of what was kept -> cells of what was hidden."""

    def __init__(self, config: EncoderConfig, audio: Cells, video: Cells) -> None:
        super().__init__()
        decoder_dim = config.decoder_dim
        self.embed = nn.Linear(config.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02)
        self.modality_a = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02)
        self.modality_v = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02)
        self.pos_embed_a = nn.Parameter(
            sincos_2d(decoder_dim, *audio.grid)[None], requires_grad=False
        )
        self.pos_embed_v = nn.Parameter(
            sincos_2d(decoder_dim, *video.grid)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(
            Block(decoder_dim, config.decoder_heads, config.mlp_ratio)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(decoder_dim)
        self.pred_a = nn.Linear(decoder_dim, math.prod(audio.size))
        self.pred_v = nn.Linear(decoder_dim, math.prod(video.size) * 3)
        initialise_linears(self)

    def train_weights(self) -> None:
        """All weights but the sine-cosine positions are trainable."""
        self.requires_grad_(True)
        self.pos_embed_a.requires_grad_(False)
        self.pos_embed_v.requires_grad_(False)

    def forward(
        self, x_BND: Tensor, audio: Masking, video: Masking, n_frames: int
    ) -> tuple[Tensor, Tensor]:
        """Predict hidden cells, in the order of `hidden` of each masking.

        Args: x_BND: kept tokens after the fusion pass, audio first.
        Returns: [B, hidden audio, values of a cell] and [B, hidden video, values of a cell] (row,
            column, channel); of patches 256 and 768.
        """
        audio_place = self.pos_embed_a + self.modality_a
        frames = frame_positions(n_frames, self.pos_embed_v)
        video_place = (self.pos_embed_v + frames).flatten(0, 1)[None] + self.modality_v
        places = [(audio_place, audio), (video_place, video)]
        kept = torch.cat([take_tokens(place, mask.keep) for place, mask in places], dim=1)
        hidden = torch.cat([take_tokens(place, mask.hidden) for place, mask in places], dim=1)
        x_BLE = torch.cat([self.embed(x_BND) + kept, self.mask_token + hidden], dim=1)
        for block in self.blocks[:-1]:
            x_BLE = block(x_BLE)
        x_BLE = self.norm(self.blocks[-1](x_BLE, tail=hidden.shape[1]))
        n_audio = audio.hidden.shape[1]
        return self.pred_a(x_BLE[:, :n_audio]), self.pred_v(x_BLE[:, n_audio:])


def reconstruction_loss(
    prediction_BNC: Tensor,
    cells_BLC: Tensor,
    hidden_BN: Tensor,
    channels: int,
) -> Tensor:
    """Mean squared error over hidden cells of mean 0 and variance 1 (CAV-MAE's norm_pix), computed
    in at least float32.

    Args: cells_BLC: all flat cells of the input, channel first; the prediction has channels last.
        channels: of the input.
    Raises: ValueError if nothing is hidden.
    """
    if not hidden_BN.shape[1]:
        raise ValueError("nothing is hidden, so nothing can be reconstructed: raise mask_ratio")
    target = take_tokens(cells_BLC, hidden_BN).unflatten(-1, (channels, -1))
    target = full_precision(target.transpose(-1, -2).flatten(-2))
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    target = (target - mean) / (variance + 1e-6).sqrt()
    return (full_precision(prediction_BNC) - target).square().mean()
