"""fill, fit_positions and take_heads: a state dict of other sizes or classes made to fit a model.

Knows nothing of where it was read. Invariant: a trunk is taken whole or not at all, and a class
head is never used in an order that was not checked by name.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from training.errors import WeightsError
from training.model.blocks import PatchStem
from training.model.encoder import Encoder
from training.weights import layouts


def fill(
    model: nn.Module, state: Mapping[str, Tensor], optional: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """Copy what fits; raise if the trunk does not. Returns (missing, unexpected)."""
    own = {key.removeprefix("encoder."): tensor for key, tensor in model.state_dict().items()}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    torn = [key for key in missing if not key.startswith(optional)]
    left = [key for key in unexpected if key.startswith(("blocks_", "patch_embed_"))]
    if torn or left:
        raise WeightsError(
            f"does not fit this encoder: {len(torn)} keys are missing {torn[:3]}, {len(left)} are "
            f"left over {left[:3]}; check encoder.depth, joint_depth and stem"
        )
    both = [key for key in own if key in state]
    for key in both:
        if state[key].shape != own[key].shape:
            raise WeightsError(
                f"{key} has shape {list(state[key].shape)}, this model's has "
                f"{list(own[key].shape)}; check encoder.dim, projection and decoder sizes"
            )
        if not torch.isfinite(state[key]).all():
            raise WeightsError(f"{key} holds NaN or infinite values: the file is damaged")
    with torch.no_grad():
        for key in both:
            own[key].copy_(state[key])
    return missing, unexpected


def fit_positions(encoder: Encoder, state: dict[str, Tensor], audio_rows: int) -> list[str]:
    """Make the state's position tables fit the encoder's grids, in place: times by
    `positions_over_time`, mel bins and pictures interpolated. Returns: their keys."""
    resized = []
    for side, stem in (("a", encoder.patch_embed_a), ("v", encoder.patch_embed_v)):
        for key in (f"pos_embed_{side}", f"decoder.pos_embed_{side}"):
            if key not in state:
                continue
            of_audio = audio_rows if isinstance(stem, PatchStem) else 1
            rows = of_audio if side == "a" else layouts.square_rows(state[key].shape[1])
            table = state[key]
            if side == "a":
                table = layouts.positions_over_time(table, rows, stem.cells.grid[1])
            table = layouts.resize_positions(table, rows, stem.cells.grid)
            if table is not state[key]:
                state[key] = table
                resized.append(key)
    return resized


def take_heads(
    state: dict[str, Tensor], classes: Sequence[str], source_classes: Sequence[str]
) -> list[str]:
    """Reorder class heads by name in place; without names take them out and return their keys."""
    keys = [key for key in state if key.startswith(("mlp_head.", "auxiliary_heads."))]
    if not (keys and classes and source_classes):
        for key in keys:
            del state[key]
        return keys
    order = layouts.class_order(classes, source_classes)
    for key in keys:
        if key.endswith((".1.weight", ".1.bias")):
            if len(state[key]) != len(source_classes):
                raise WeightsError(
                    f"{key} has {len(state[key])} classes, {len(source_classes)} names were given"
                )
            state[key] = state[key][order]
    return []
