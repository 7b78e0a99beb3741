"""Rates of the steps and of the heads, and an optimizer's state from another kind of device."""

from pathlib import Path

import pytest
import torch
from support.trainers import make_trainer, pretrain_config

from training.config import OptimConfig
from training.loop.schedule import make_optimizer, restore_optimizer


def test_heads_have_a_rate_of_their_own_in_pretraining(tmp_path: Path) -> None:
    optim = {**pretrain_config().optim.model_dump(), "head_lr_scale": 10.0}
    trainer, _ = make_trainer(pretrain_config(optim=optim), tmp_path)
    names = {id(p): name for name, p in trainer.encoder.named_parameters()}
    scales: dict[bool, set[float]] = {True: set(), False: set()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            scales[names[id(parameter)].startswith("class_heads.")].add(group["lr_scale"])
    assert scales == {True: {10.0}, False: {1.0}}


@pytest.mark.parametrize(
    ("warmup_epochs", "rates"), [(0.5, [2 / 3, 1]), (0.2, [1]), (1, [1 / 3, 2 / 3, 1])]
)
def test_a_warmup_ends_at_the_peak_whatever_part_of_an_epoch_it_takes(
    warmup_epochs: float, rates: list[float], tmp_path: Path
) -> None:
    """Of 3 steps; the second one of a warm-up of 1.5 had 4/3 of the peak."""
    optim = {"lr": 1e-3, "warmup_epochs": warmup_epochs, "schedule": "constant"}
    config = pretrain_config(optim=optim, pretrain={"epochs": 2, "log_every": 1})
    trainer, recorder = make_trainer(config, tmp_path, rounds=False)
    trainer.run()
    expected = [*rates, *[1.0] * (6 - len(rates))]
    assert [m["lr"] for _, m in recorder.logged] == pytest.approx([1e-3 * r for r in expected])


def test_state_of_a_run_on_cpus_goes_where_a_fused_kernel_reads_it() -> None:
    """`meta` stands for a GPU: fused AdamW keeps its counters of steps beside the weights."""
    weight = torch.nn.Parameter(torch.ones(3, 2))
    before = make_optimizer([("w", weight)], OptimConfig())
    weight.grad = torch.ones_like(weight)
    before.step()
    elsewhere = torch.nn.Parameter(torch.empty(3, 2, device="meta"))
    optimizer = make_optimizer([("w", elsewhere)], OptimConfig())
    state = before.state_dict()
    restore_optimizer(optimizer, state, fused=True)
    assert optimizer.param_groups[0]["fused"] is True
    assert {str(x.device) for x in optimizer.state[elsewhere].values()} == {"meta"}
    assert not state["param_groups"][0]["fused"], "the checkpoint is as it was"
