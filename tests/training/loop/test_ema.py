"""The confusion matrix forgets by epochs, however its updates fall into them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.trainers import finetune_config, make_trainer, make_tuner, pretrain_config

from training.losses.confusion import ConfusionState


class Clock:
    """Every update of a trainer: the step it fell on, and the epochs it said had passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainer: Any = None
        self.updates: list[tuple[int, float]] = []
        update = ConfusionState.update

        def noted(state: ConfusionState, elapsed_epochs: float, since: float) -> None:
            self.updates.append((self.trainer.step, elapsed_epochs))
            update(state, elapsed_epochs, since)

        monkeypatch.setattr(ConfusionState, "update", noted)

    def run(self, trainer: Any, *arguments: Any) -> list[tuple[int, float]]:
        self.trainer, self.updates = trainer, []
        trainer.run(*arguments)
        return self.updates


def _check(updates: list[tuple[int, float]], first_step: int, steps_per_epoch: int) -> None:
    assert len(updates) >= 2
    before = first_step
    for step, elapsed in updates:
        assert elapsed == pytest.approx((step - before) / steps_per_epoch), f"at step {step}"
        before = step


@pytest.mark.parametrize("batch_size", [8, 16])
@pytest.mark.parametrize("update_steps", [1, 2, 4, 5])
def test_pretraining_counts_every_step_once(
    update_steps: int, batch_size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = pretrain_config(
        confusion={"update_steps": update_steps},
        pretrain={"batch_size": batch_size, "checkpoint_every": 5},
        rounds={"every_epochs": 9},
    )
    clock = Clock(monkeypatch)
    trainer, recorder = make_trainer(config, tmp_path / "whole")
    updates = clock.run(trainer)
    assert trainer.labelling.first_step is not None
    _check(updates, trainer.labelling.first_step, 48 // batch_size)
    labelled = [state for state in recorder.states[:-1] if state["labelling"]["confusion"]]
    assert labelled
    for number, state in enumerate(labelled):
        folder = tmp_path / f"resumed-{number}"
        shutil.copytree(tmp_path / "whole" / "rounds", folder / "rounds")
        resumed, _ = make_trainer(config, folder)
        again = clock.run(resumed, state)
        assert again == [update for update in updates if update[0] > state["step"]]


@pytest.mark.parametrize("update_steps", [1, 2, 4, 5])
def test_fine_tuning_counts_every_step_once(
    update_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finetune_config(batch_size=8, epochs=2)
    changes = {
        "confusion": config.confusion.model_copy(update={"update_steps": update_steps}),
        "pretrain": config.pretrain.model_copy(update={"checkpoint_every": 5}),
    }
    config = config.model_copy(update=changes)
    clock = Clock(monkeypatch)
    states: list[dict[str, Any]] = []
    updates = clock.run(make_tuner(config, states))
    _check(updates, 0, 6)
    for state in states[:-1]:
        again = clock.run(make_tuner(config), state)
        assert again == [update for update in updates if update[0] > state["step"]]
