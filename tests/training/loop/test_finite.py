"""A host that runs ahead of its device: nothing changes, but when it learns of a step.

The device is the CPU told that it is one to run ahead of; its optimiser has the fused kernel of a
GPU, which leaves a step out by itself.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.trainers import (
    Recorder,
    finetune_config,
    make_trainer,
    make_tuner,
    pretrain_config,
    same,
    weights_of,
)

from training.data.device import DeviceBatch, HostCopy, on_device
from training.data.reader import Batch
from training.errors import NonFiniteLoss
from training.loop.hooks import World


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "runs_ahead", True)


def test_a_run_ahead_resumes_to_the_bit_and_pushes_every_row(ahead: None, tmp_path: Path) -> None:
    whole, recorder = make_trainer(pretrain_config(), tmp_path / "whole")
    whole.run()
    assert recorder.logged[-1][1]["clustering/coverage"] == 1.0
    assert recorder.logged[-1][1]["clustering/rows_dropped"] == 0.0
    state = next(s for s in recorder.states if not s["labelling"]["pending"])
    resumed, _ = make_trainer(pretrain_config(), tmp_path / "resumed")
    assert resumed.labelling.rounds is not None
    resumed.labelling.rounds.restore(state["bank"])
    resumed.run(state)
    assert same(weights_of(whole), weights_of(resumed))


def test_a_bad_step_is_known_one_step_late_and_no_weight_moves_after_it(
    ahead: None, tmp_path: Path
) -> None:
    trainer, recorder = make_trainer(pretrain_config(), tmp_path, poison=5)
    before: dict[int, dict[str, torch.Tensor]] = {}
    step = trainer._train_step

    def watched(batch: DeviceBatch) -> None:
        before[trainer.step] = weights_of(trainer)
        step(batch)

    trainer._train_step = watched  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLoss, match="saved in kept"):
        trainer.run()
    bad = recorder.failed[0]["step"]
    assert "clip0000005_000005" in recorder.failed[0]["clip_ids"]
    assert trainer.step <= bad + 1
    assert same(before[bad], weights_of(trainer))
    assert bad == 0 or not same(before[0], before[bad]), "no step was taken before it"


def test_a_step_waits_for_nothing_but_the_step_before(
    ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = make_tuner(finetune_config(epochs=1, confusion_after_epochs=0))
    waited: list[int] = []
    made: dict[int, int] = {}
    start, wait = HostCopy.__init__, HostCopy.wait

    def noted(copy: HostCopy, x: torch.Tensor) -> None:
        made[id(copy)] = tuner.step
        start(copy, x)

    def counted(copy: HostCopy) -> torch.Tensor:
        waited.append(tuner.step - made[id(copy)])
        return wait(copy)

    monkeypatch.setattr(HostCopy, "__init__", noted)
    monkeypatch.setattr(HostCopy, "wait", counted)
    tuner.run()
    # One step late, and once for the last step before the checkpoint at the end of the epoch.
    assert waited == [1, 1, 1]


def _failing(lr: float, poison: int | None, rank: int, size: int) -> tuple[str, dict[str, Any]]:
    config = pretrain_config(optim={"lr": lr, "warmup_epochs": 0, "clip_norm": None})
    around: dict[str, Any] = {"world": World(rank, size), "rounds": False, "poison": poison}
    trainer, recorder = make_trainer(config, Path(), Recorder(), **around)
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.run()
    return str(caught.value), recorder.failed[0]


def test_of_several_ranks_the_one_with_the_bad_clip_is_named_and_one_keeps_the_state() -> None:
    (said, first), (also_said, second) = run_ranks(2, functools.partial(_failing, 1e-3, 5))
    [guilty] = [
        failed["rank"] for failed in (first, second) if "clip0000005_000005" in failed["clip_ids"]
    ]
    assert f"features that are not finite, of rank {guilty}: clip0000005_000005. " in said
    assert "store verify --repair" in said
    assert also_said == said
    assert ("state" in first, "state" in second) == (True, False)
    assert len(second["batch"]["fbank"]) == len(second["clip_ids"]) == 8


def test_where_no_rank_is_at_fault_alone_clips_of_all_are_named_and_how_to_go_on() -> None:
    said, failed = run_ranks(2, functools.partial(_failing, 1e30, None))[1]
    assert "no clip at fault alone, of rank 0: clip" in said
    assert f"; rank 1: {failed['clip_ids'][0]}, " in said
    assert "optim.lr or optim.clip_norm" in said
    assert "--init kept" in said


def test_a_clip_of_which_the_model_makes_nothing_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(batches: Iterator[Batch], device: torch.device) -> Iterator[DeviceBatch]:
        for batch in on_device(batches, device):
            batch.fbank_nTM[3] = torch.inf
            yield batch._replace(read=batch.read._replace(fbank=np.zeros_like(batch.read.fbank)))

    monkeypatch.setattr("training.loop.pretrainer.on_device", spoiled)
    trainer, recorder = make_trainer(pretrain_config(), tmp_path)
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.run()
    of_it = recorder.failed[0]["clip_ids"][3]
    assert f"outputs of the model that are not finite, of rank 0: {of_it}. " in str(caught.value)
