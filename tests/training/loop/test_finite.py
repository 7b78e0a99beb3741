"""A host that runs ahead of its device: nothing changes, but when it learns of a step.

The device is the CPU told that it is one to run ahead of; its optimiser has the fused kernel of a
GPU, which leaves a step out by itself.
"""

from pathlib import Path

import pytest
import torch
from support.trainers import (
    finetune_config,
    make_trainer,
    make_tuner,
    pretrain_config,
    same,
    weights_of,
)

from training.data.device import DeviceBatch, HostCopy
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
