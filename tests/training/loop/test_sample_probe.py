"""The probe of training features: its definition, a resumed epoch, and what it leaves alone."""

from pathlib import Path

import numpy as np
import torch
from support.memory import memory_index
from support.trainers import make_trainer, pretrain_config, same, weights_of

from training.loop.hooks import World
from training.loop.sample_probe import SampleProbe


def _fed(probe: SampleProbe, z: torch.Tensor, first: int = 0, last: int | None = None) -> None:
    keys = memory_index().keys_N
    for start in range(first, len(keys) if last is None else last, 7):
        rows = slice(start, min(start + 7, len(keys) if last is None else last))
        probe.add(keys[rows], {"audio": z[rows], "video": torch.randn(z[rows].shape)})


def test_neighbours_of_one_class_are_right_and_those_by_chance_are_not() -> None:
    index = memory_index()
    torch.manual_seed(0)
    z = torch.eye(16)[torch.from_numpy(index.labels_N)] + 0.01 * torch.randn(len(index), 16)
    probe = SampleProbe(index, World())
    _fed(probe, z)
    found = probe.measure()
    assert found["train_knn/audio"] == 1.0
    assert found["train_knn/video"] < 0.6
    assert probe.measure() == {}, "the next epoch starts anew"


def test_an_epoch_taken_up_in_its_middle_counts_all_of_its_clips() -> None:
    index = memory_index()
    torch.manual_seed(0)
    z, middle = torch.randn(len(index), 16), len(index) // 2
    whole, first, second = (SampleProbe(index, World()) for _ in range(3))
    _fed(whole, z)
    _fed(first, z, last=middle)
    second.load_state_dict(first.state_dict())
    _fed(second, z, first=middle)
    assert second.measure()["train_knn/audio"] == whole.measure()["train_knn/audio"]


def test_clips_without_a_label_are_no_sample() -> None:
    index = memory_index()
    unlabelled = index.take(np.arange(len(index)))
    unlabelled.labels_NL[:] = -1
    probe = SampleProbe(unlabelled, World())
    _fed(probe, torch.randn(len(index), 16))
    assert probe.measure() == {}


def test_every_epoch_logs_it_and_training_does_not_change(tmp_path: Path, monkeypatch) -> None:
    config = pretrain_config(pretrain={"epochs": 2})
    trainer, recorder = make_trainer(config, tmp_path / "with")
    trainer.run()
    logged = [step for step, metrics in recorder.logged if "train_knn/video" in metrics]
    assert logged == [trainer.steps_per_epoch, 2 * trainer.steps_per_epoch]
    monkeypatch.setattr(SampleProbe, "add", lambda *_: None)
    without, _ = make_trainer(config, tmp_path / "without")
    without.run()
    assert same(weights_of(trainer), weights_of(without))
