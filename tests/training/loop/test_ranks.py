"""Pretraining on several ranks: what one process learns, however the ranks share the clips."""

import functools
from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks
from support.trainers import make_trainer, pretrain_config, same, weights_of

from training.loop.hooks import World


def _trained(folder: Path, rank: int, n_ranks: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of three lanes in two epochs, with another phase in the second."""
    config = pretrain_config(
        data={"lanes": 3},
        rounds={"labels": "none"},
        pretrain={"epochs": 2, "batch_size": 12, "micro_batch": 4, "log_every": 1},
    )
    trainer, recorder = make_trainer(config, folder, world=World(rank, n_ranks), rounds=False)
    trainer.run()
    return [metrics["loss"] for _, metrics in recorder.logged], weights_of(trainer)


def test_a_rank_with_one_chunk_trains_beside_one_with_two(tmp_path: Path) -> None:
    losses, alone = _trained(tmp_path, 0, 1)
    # A lane of four clips for one rank, two for the other.
    (found, first), (_, second) = run_ranks(2, functools.partial(_trained, tmp_path))
    assert found == pytest.approx(losses, rel=1e-4)
    assert same(first, second)
    # AdamW makes whole steps of the noise of gradients that are nearly zero.
    worst = max(float((first[name] - alone[name]).abs().max()) for name in alone)
    assert worst < 5e-3, worst
