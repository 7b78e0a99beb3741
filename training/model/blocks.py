"""Block and PatchStem: the layers that encoder and decoder are made of, and their positions.

Pure modules: knows nothing of clips, losses, weights files or devices.
Invariant: names and arithmetic are CAV-MAE's (LayerNorm eps 1e-5, exact GELU, pre-norm), so that
its weights load without translation; only norms that some pass uses exist.

Shapes: B clips, L tokens, D token width, H rows and W columns of a patch grid.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 16
"""Side of a patch, of fbank (mel bins x fbank frames) and of picture alike."""

NORM_SUFFIX = {"fusion": "", "audio": "_a", "video": "_v"}
"""Which norms of a joint block a stream uses; CAV-MAE's key names."""


class Attention(nn.Module):
    """Multi-head self-attention by scaled_dot_product_attention."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Mix the tokens of each row of the batch: [B, L, D] -> [B, L, D]."""
        qkv = self.qkv(x_BLD).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        heads = F.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.proj(heads.transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        out_BLD: Tensor = self.fc2(F.gelu(self.fc1(x_BLD)))
        return out_BLD


class Block(nn.Module):
    """Pre-norm transformer block with one pair of norms for each stream that passes through."""

    def __init__(
        self, dim: int, n_heads: int, mlp_ratio: float, streams: Sequence[str] = ("fusion",)
    ) -> None:
        super().__init__()
        for stream in streams:
            self.add_module(f"norm1{NORM_SUFFIX[stream]}", nn.LayerNorm(dim))
            self.add_module(f"norm2{NORM_SUFFIX[stream]}", nn.LayerNorm(dim))
        self.attn = Attention(dim, n_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def used_by(self, stream: str) -> list[nn.Module]:
        """The layers a pass of `stream` goes through."""
        suffix = NORM_SUFFIX[stream]
        return [
            getattr(self, f"norm1{suffix}"),
            getattr(self, f"norm2{suffix}"),
            self.attn,
            self.mlp,
        ]

    def forward(self, x_BLD: Tensor, stream: str = "fusion", tail: int | None = None) -> Tensor:
        """Attention and MLP, each on normed input, each added to it.

        Args: stream: whose norms to use. tail: with it only the last `tail` tokens come back
            (the MLP is not spent on tokens nobody reads).
        """
        suffix = NORM_SUFFIX[stream]
        x_BLD = x_BLD + self.attn(getattr(self, f"norm1{suffix}")(x_BLD))
        if tail is not None:
            x_BLD = x_BLD[:, x_BLD.shape[1] - tail :]
        changed: Tensor = self.mlp(getattr(self, f"norm2{suffix}")(x_BLD))
        return x_BLD + changed


class Cells(NamedTuple):
    """The part of a picture that each token of a stem stands for, row-major."""

    grid: tuple[int, int]
    """Rows and columns of cells."""
    size: tuple[int, int]
    """Height and width of a cell."""

    def cut(self, x_BCHW: Tensor) -> Tensor:
        """Picture -> flat cells [B, n, C * height * width], each in C, row, column.

        What lies beyond the last cell is left out; where the last one is not full it has zeros.
        """
        (rows, cols), (height, width) = self
        missing = (0, cols * width - x_BCHW.shape[3], 0, rows * height - x_BCHW.shape[2])
        if any(missing):
            x_BCHW = F.pad(x_BCHW, missing)  # negative: cropped
        cells = x_BCHW.unflatten(3, (cols, width)).unflatten(2, (rows, height))
        flat = torch.flatten(cells.permute(0, 2, 4, 1, 3, 5), 3)
        return torch.flatten(flat, 1, 2)

    def only(self, x_BCHW: Tensor, kept_Bn: Tensor) -> Tensor:
        """The picture with zeros wherever `kept_Bn`, of the picture's dtype, is 0 and not 1."""
        (height, width), (H, W) = self.size, x_BCHW.shape[2:]
        kept = kept_Bn.unflatten(1, (1, *self.grid))
        kept = kept.repeat_interleave(height, 2).repeat_interleave(width, 3)
        only_BCHW: Tensor = x_BCHW * kept[..., :H, :W]
        return only_BCHW


class PatchStem(nn.Module):
    """16x16 patches through one linear map, stored as the convolution that CAV-MAE stores.

    Patches are cut before they are embedded, so that a masked pass embeds only what it keeps.
    Rows and columns beyond the last whole patch are left out.
    """

    def __init__(self, dim: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        if height < PATCH or width < PATCH:
            raise ValueError(
                f"input of {height} x {width} is smaller than one {PATCH} x {PATCH} patch; "
                "use stem: conv or larger features"
            )
        self.cells = Cells((height // PATCH, width // PATCH), (PATCH, PATCH))
        self.n_tokens = math.prod(self.cells.grid)
        self.proj = nn.Conv2d(channels, dim, PATCH, PATCH)
        nn.init.xavier_uniform_(self.proj.weight.view(dim, -1))

    def forward(self, patches_BLC: Tensor) -> Tensor:
        """Embed flat patches: [B, L, C*16*16] -> [B, L, D]."""
        return F.linear(patches_BLC, self.proj.weight.flatten(1), self.proj.bias)


def sincos_1d(positions_N: Tensor, dim: int) -> Tensor:
    """Sines then cosines of positions at `dim / 2` geometric frequencies: [N, dim] float64."""
    if dim % 2:
        raise ValueError(f"sine-cosine positions need an even width, found {dim}")
    steps = torch.arange(dim // 2, dtype=torch.float64, device=positions_N.device)
    angles = positions_N.double()[:, None] * 10000.0 ** (-steps / (dim / 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(dim: int, n_rows: int, n_cols: int) -> Tensor:
    """Positions of a grid, row-major: [n_rows * n_cols, dim] float32.

    The first half of the width tells the column, the second the row (as in MAE and CAV-MAE).
    """
    rows, cols = torch.meshgrid(torch.arange(n_rows), torch.arange(n_cols), indexing="ij")
    halves = [sincos_1d(axis.flatten(), dim // 2) for axis in (cols, rows)]
    return torch.cat(halves, dim=1).float()


def frame_positions(n_frames: int, like_D: Tensor) -> Tensor:
    """What frame f of a clip adds to its tokens: [F, 1, D], zero for the first frame.

    Zero at f = 0 makes one frame exactly CAV-MAE; no parameter, so nothing is unused at F = 1.
    """
    if n_frames == 1:
        return like_D.new_zeros(1, 1, like_D.shape[-1])
    table = sincos_1d(torch.arange(n_frames, device=like_D.device), like_D.shape[-1])
    return (table - table[:1])[:, None].to(like_D.dtype)


def initialise_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer under `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def full_precision(x: Tensor) -> Tensor:
    """float32, or float64 where it is already: what follows must not run in bf16."""
    return x if x.dtype == torch.float64 else x.float()
