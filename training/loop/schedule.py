"""make_optimizer and learning_rate: AdamW in its groups, and the rate of each step.

Knows nothing of models beyond their named parameters. Invariant: the rate of a step depends on the
step and the config alone, so a resumed run and another world size see the same schedule.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from training.config import OptimConfig

_HEADS = ("mlp_head", "auxiliary_heads", "class_heads")
_ONE_RATE = ("mlp_head", "auxiliary_heads")
"""Heads with groups of their own where all rates are one, too: checkpoints keep their groups."""


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW in four groups: trunk or head, with or without decay (norms, biases, embeddings).

    Weights that are frozen now are among them: a later phase may thaw them. Args: fused: one kernel
    for all weights, which can leave a step out on the device (FiniteSteps).
    """
    heads = _ONE_RATE if config.head_lr_scale == 1 else _HEADS
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        is_head = name.startswith(heads)
        decays = parameter.ndim > 1 and "pos_embed" not in name and "modality" not in name
        groups.setdefault((is_head, decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": config.lr,
                "lr_scale": config.head_lr_scale if is_head else 1.0,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (is_head, decays), parameters in sorted(groups.items())
        ],
        betas=config.betas,
        fused=fused,
    )


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Rate of `step` (from 0): linear warm-up, then cosine to 0, steps, or constant."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        # Of a warm-up that ends within this step the rest is left out: the rate is the peak.
        return config.lr * (step + 1) / max(warmup, step + 1)
    if config.schedule == "cosine":
        total = epochs * steps_per_epoch
        progress = (step - warmup) / max(1.0, total - warmup)
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "steps":
        passed = sum(step >= epoch * steps_per_epoch for epoch in config.decay_epochs)
        return config.lr * config.decay_rate**passed
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group, heads by their own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], fused: bool) -> None:
    """Take over a `state_dict`, perhaps of another kind of device."""
    # Before it is loaded: where its counters of steps belong is read from it.
    groups = [{**group, "fused": fused} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})
