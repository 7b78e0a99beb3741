"""No step waits for its device: what a GPU would have to be asked for is counted on the CPU.

The CPU is told that it is a device to run ahead of. A `TorchDispatchMode` sees every operation;
those that read a value, or whose shape depends on values, would stop the host until the device has
caught up.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.trainers import finetune_config, make_trainer, make_tuner, pretrain_config
from torch.utils._python_dispatch import TorchDispatchMode

from training.data.device import HostCopy
from training.loop.finetuner import Finetuner
from training.loop.hooks import World
from training.loop.pretrainer import Pretrainer

aten = torch.ops.aten
READS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
)


class Waits(TorchDispatchMode):
    """Notes operations that wait for a device, but for those on copies that are there already."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.arrived: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func in (aten.index.Tensor, aten.index_put_.default) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if (func in READS or by_mask) and args[0].data_ptr() not in self.arrived:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    monkeypatch.setattr(World, "runs_ahead", True)
    noted = Waits()
    wait = HostCopy.wait

    def arrived(copy: HostCopy) -> torch.Tensor:
        noted.arrived.add(wait(copy).data_ptr())
        return wait(copy)

    def on_host(x: torch.Tensor) -> Any:
        noted.seen.append("tolist")
        return read(x)

    read = torch.Tensor.tolist
    monkeypatch.setattr(HostCopy, "wait", arrived)
    monkeypatch.setattr(torch.Tensor, "tolist", on_host)
    return noted


def _watch(trainer: Pretrainer | Finetuner, waits: Waits) -> list[int]:
    """Watch all of a step but logs, checkpoints, rounds. Returns: waits of each, to be filled."""
    found: list[int] = []
    train_step, after_step = trainer._train_step, trainer._after_step

    def step(batch: Any) -> None:
        waits.seen.clear()
        with waits:
            train_step(batch)
        found.append(len(waits.seen))

    def after() -> None:
        logs = trainer.step % trainer.steps_per_epoch == 0
        waits.seen.clear()
        if logs:
            after_step()
            return
        with waits:
            after_step()
        found.append(len(waits.seen))

    trainer._train_step = step  # type: ignore[method-assign]
    trainer._after_step = after  # type: ignore[method-assign]
    return found


NEVER = {"log_every": 1000, "checkpoint_every": 1000}


def test_a_pretraining_step_waits_for_nothing_between_logs(waits: Waits, tmp_path: Path) -> None:
    colours = {"hue": 0.5, "saturation": 0.5, "greyscale": 0.3, "blur": 1.0}
    config = pretrain_config(pretrain=NEVER, confusion={"update_steps": 1}, augment=colours)
    trainer, _ = make_trainer(config, tmp_path)
    found = _watch(trainer, waits)
    trainer.run()
    assert trainer.labelling.labelled
    assert found == [0] * len(found)
    assert len(found) > trainer.last_step


def test_a_fine_tuning_step_waits_for_nothing_between_logs(waits: Waits) -> None:
    config = finetune_config(mixup=0.5, confusion_after_epochs=0)
    config = config.model_copy(
        update={
            "pretrain": config.pretrain.model_copy(update=NEVER),
            "confusion": config.confusion.model_copy(update={"update_steps": 1}),
        }
    )
    tuner = make_tuner(config)
    found = _watch(tuner, waits)
    tuner.run()
    assert found == [0] * len(found)
    assert len(found) > tuner.step


def test_a_step_that_reads_its_loss_would_be_noticed(
    waits: Waits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = make_trainer(pretrain_config(pretrain=NEVER), tmp_path, rounds=False)
    count = trainer._count
    monkeypatch.setattr(trainer, "_count", lambda *a: (float(a[2]), count(*a)))
    found = _watch(trainer, waits)
    trainer.run(until_epoch=1)
    assert found[0] == 1
