"""from_cavmae, from_mae, to_cavmae: weights of other people's files under our names and shapes.

Pure dictionaries of tensors: knows nothing of files or URIs. Invariant: what CAV-MAE computes with
a state dict, the encoder computes with its translation; translating back loses nothing CAV-MAE
reads (norms that no pass of CAV-MAE uses come back as 1 and 0).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from training.errors import WeightsError
from training.model.blocks import sincos_2d

State = dict[str, Tensor]
Layout = Literal["diccae", "cavmae", "mae"]

_UNUSED_NORM = re.compile(r"^(blocks_[av]|decoder\.blocks)\.\d+\.norm[12]_[av]\.(weight|bias)$")
_PLAIN_NORM = re.compile(r"^((?:blocks_[av]|decoder\.blocks)\.\d+\.norm[12])\.(weight|bias)$")
_AUDIO_PIXELS = 16 * 16


def strip_wrappers(state: Mapping[str, Tensor]) -> State:
    """Keys without the `module.` that DataParallel and DistributedDataParallel put in front."""
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def detect(state: Mapping[str, Tensor]) -> Layout:
    """Whose layout a state dict has.

    Raises: WeightsError if it is none that is known.
    """
    if any("class_heads." in key for key in state):
        return "diccae"
    if "patch_embed_a.proj.weight" in state:
        return "cavmae"
    if "patch_embed.proj.weight" in state and "blocks.0.attn.qkv.weight" in state:
        return "mae"
    some = ", ".join(list(state)[:5])
    raise WeightsError(
        f"{len(state)} tensors ({some}, ...) are neither CAV-MAE's (patch_embed_a.proj.weight), "
        "MAE ViT's (patch_embed.proj.weight) nor a diccae encoder's (class_heads.*)"
    )


def from_cavmae(state: Mapping[str, Tensor]) -> State:
    """CAV-MAE's keys -> the encoder's; norms that CAV-MAE stores but never uses are left out."""
    named = {_from_cavmae_key(key): tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in named.items() if not _UNUSED_NORM.match(key)}


def to_cavmae(state: Mapping[str, Tensor]) -> State:
    """The encoder's keys -> CAV-MAE's, with the norms it expects and never uses at 1 and 0.

    Class heads and auxiliary heads have no place in that layout and are left out.
    """
    out: State = {}
    for key, tensor in state.items():
        if key.startswith(("class_heads.", "auxiliary_heads.")):
            continue
        out[_to_cavmae_key(key)] = tensor
        match = _PLAIN_NORM.match(key)
        if match:
            fill = torch.ones_like if match[2] == "weight" else torch.zeros_like
            for side in "av":
                out[_to_cavmae_key(f"{match[1]}_{side}.{match[2]}")] = fill(tensor)
    return out


def from_mae(state: Mapping[str, Tensor], depth: int, joint_depth: int) -> State:
    """A masked-autoencoder ViT (timm's keys) -> the encoder's, both branches from the same blocks.

    As CAV-MAE starts: blocks and norms are copied to each use, audio patches take the sum of the
    colour kernels, decoder_pred_a the first 256 rows; positions are copied for video only.

    Raises: WeightsError if the file has another number of blocks than depth + joint_depth.
    """
    n_blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if n_blocks != depth + joint_depth:
        raise WeightsError(
            f"the MAE file has {n_blocks} blocks; encoder.depth + encoder.joint_depth is "
            f"{depth} + {joint_depth}: set them to add up to {n_blocks}"
        )
    out: State = {}
    for key, tensor in state.items():
        for target in _mae_targets(key, depth):
            out[target] = tensor
    out["patch_embed_a.proj.weight"] = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    out["pos_embed_v"] = state["pos_embed"][:, 1:]
    if "decoder_pos_embed" in state:
        out["decoder.pos_embed_v"] = state["decoder_pos_embed"][:, 1:]
    for part in ("weight", "bias"):
        if f"decoder_pred.{part}" in state:
            out[f"decoder.pred_a.{part}"] = state[f"decoder_pred.{part}"][:_AUDIO_PIXELS]
    return out


def positions_over_time(table_1LD: Tensor, n_rows: int, n_cols: int) -> Tensor:
    """Positions of an audio grid for shorter or longer clips: [1, L, D] -> [1, n_rows * n_cols, D].

    Every fbank has a row each 10 ms and starts where its clip does, so column t is the same time in
    all of them: fewer columns are the first ones, and not all of them closer together. Later ones
    go on with the sine-cosine of a table that is one; a learned table says nothing of them, and
    comes back as it is. (AST cuts the middle out of tables of pictures, which have no time.)

    Args: n_rows: of the table. Raises: WeightsError if it is no grid of that many rows.
    """
    grid_1RCD = table_1LD.unflatten(1, _grid_of(table_1LD, n_rows))
    n_known, dim = grid_1RCD.shape[2:]
    if n_cols < n_known:
        first_1LD: Tensor = grid_1RCD[:, :, :n_cols].flatten(1, 2)
        return first_1LD
    if n_cols == n_known or dim % 4:
        return table_1LD
    longer_1RCD = sincos_2d(dim, n_rows, n_cols).to(table_1LD).unflatten(0, (n_rows, n_cols))[None]
    # Not exactly: a table may have been kept in half precision.
    if not torch.allclose(longer_1RCD[:, :, :n_known], grid_1RCD, rtol=0, atol=2e-3):
        return table_1LD
    return torch.cat([grid_1RCD, longer_1RCD[:, :, n_known:]], dim=2).flatten(1, 2)


def _grid_of(table_1LD: Tensor, n_rows: int) -> tuple[int, int]:
    """Rows and columns of a table. Raises: WeightsError if it has no such rows."""
    length = table_1LD.shape[1]
    if length % n_rows:
        raise WeightsError(f"{length} positions are no grid of {n_rows} rows")
    return n_rows, length // n_rows


def resize_positions(table_1LD: Tensor, source_rows: int, grid: tuple[int, int]) -> Tensor:
    """Positions of one token grid made to fit another, bicubic: [1, L, D] -> [1, rows*cols, D].

    The same picture, or mel bins of the same range, in more or fewer tokens.

    Args: source_rows: rows of the source grid (CAV-MAE's audio: 8).
    Raises: WeightsError if the source is no grid of that many rows.
    """
    old_grid = _grid_of(table_1LD, source_rows)
    if old_grid == grid:
        return table_1LD
    planes = table_1LD.float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=grid, mode="bicubic", align_corners=False)
    return planes.permute(0, 2, 3, 1).flatten(1, 2).to(table_1LD.dtype)


def square_rows(n_tokens: int) -> int:
    """Rows of a square grid.

    Raises: WeightsError if `n_tokens` is no square.
    """
    rows = math.isqrt(n_tokens)
    if rows * rows != n_tokens:
        raise WeightsError(f"{n_tokens} positions of a picture are no square grid")
    return rows


def class_order(classes: Sequence[str], source_classes: Sequence[str]) -> list[int]:
    """For each of `classes` its index in `source_classes`, names compared by their words.

    Case and punctuation do not matter: published VGGSound lists write `bird chirping, tweeting`
    and `bird chirping_ tweeting`, and sort them differently.

    Raises: WeightsError naming classes that are missing or ambiguous in the source.
    """
    places: dict[str, int] = {}
    for index, name in enumerate(source_classes):
        if _words(name) in places:
            twin = source_classes[places[_words(name)]]
            raise WeightsError(
                f"class names {twin!r} and {name!r} of the source cannot be told apart"
            )
        places[_words(name)] = index
    absent = [name for name in classes if _words(name) not in places]
    if absent:
        some = ", ".join(map(repr, absent[:5]))
        raise WeightsError(
            f"{len(absent)} of {len(classes)} classes are not in the source's list of "
            f"{len(source_classes)}: {some}; give the list that belongs to these weights"
        )
    return [places[_words(name)] for name in classes]


def _words(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


def _from_cavmae_key(key: str) -> str:
    if key == "mask_token":
        return "decoder.mask_token"
    return f"decoder.{key[8:]}" if key.startswith("decoder_") else key


def _to_cavmae_key(key: str) -> str:
    if key == "decoder.mask_token":
        return "mask_token"
    return f"decoder_{key[8:]}" if key.startswith("decoder.") else key


def _mae_targets(key: str, depth: int) -> list[str]:
    """Where one tensor of a MAE ViT goes; position tables and channel sums are not made here."""
    head, _, rest = key.partition(".")
    if head == "blocks":
        number, _, name = rest.partition(".")
        if int(number) < depth:
            return [f"blocks_{side}.{rest}" for side in "av"]
        joint = f"blocks_u.{int(number) - depth}."
        norm, _, part = name.partition(".")
        if norm in ("norm1", "norm2"):
            return [f"{joint}{norm}{suffix}.{part}" for suffix in ("", "_a", "_v")]
        return [joint + name]
    if head == "norm":
        return [f"norm{suffix}.{rest}" for suffix in ("", "_a", "_v")]
    if head == "patch_embed":
        sides = "av" if key.endswith("bias") else "v"
        return [f"patch_embed_{side}.{rest}" for side in sides]
    if head == "decoder_pred":
        return [f"decoder.pred_v.{rest}"]
    if head in ("pos_embed", "decoder_pos_embed"):
        return []
    return [_from_cavmae_key(key)]
