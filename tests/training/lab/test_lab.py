"""Runs of the lab that were stopped or died go on, and what they pretrain from."""

import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.runs import lines
from support.stores import noise_store

from clustering.errors import ClusteringError
from clustering.kmeans.label_table import NO_LABEL
from clustering.rounds.files import load_round
from clustering.rounds.local import LocalRounds
from pipeline.config import FeatureSpec
from pipeline.storage import Location
from training.attempt import UNHELD
from training.config import TrainingConfig
from training.data.rows import few_of_each_class
from training.lab import lab
from training.lab.features import decode_store, open_features
from training.lab.lab import Lab
from training.run.checkpoints import WHOLE, Span, newest_checkpoint, state_in, write_state
from training.run.edge import Written
from training.run.pinned import Pinned, pin

SPEC = FeatureSpec(n_frames=2, frame_size=32, fbank_frames=32, n_mels=16, duration_s=1.0)
CONFIG = TrainingConfig.model_validate(
    {
        "encoder": {"preset": "tiny", "dim": 32, "projection": 16},
        "data": {"lanes": 3, "shuffle_window": 8, "fbank_mean": 0.0, "fbank_std": 1.0},
        "loss": {"temperature": 0.1, "intra": 1.0, "intra_epochs": 1},
        "rounds": {"warmup_epochs": 1, "margin_nats": -9.0, "lead_steps": 2},
        "pretrain": {"epochs": 3, "batch_size": 18, "checkpoint_every": 2, "log_every": 1},
        "scale": {"num_workers": 1, "cpus_per_worker": 0.3, "reader_cpus": 0.1},
        "clustering": {
            "k": 4,
            "guard": {"max_mean_cosine": 1.0, "min_effective_frac": 0.0, "max_churn": 1.0},
        },
    }
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Pinned:
    folder = tmp_path_factory.mktemp("lab")
    store = noise_store(folder / "store", SPEC, 54)
    decode_store(store.snapshot(), folder / "features")
    return pin(str(store.uri), None, CONFIG)


def _lab(data: Pinned) -> Lab:
    return Lab(open_features(Path(data.snapshot.uri).parent / "features", SPEC))


def _pretrain(
    data: Pinned, out: Path, span: Span = WHOLE, **changes: Any
) -> dict[str, torch.Tensor]:
    written = Written(Location(out), {}, UNHELD)
    config = TrainingConfig.model_validate(CONFIG.model_dump() | changes)
    _lab(data).pretrain(config, data.train, written, span)
    return load_file(out / "encoder" / "encoder.safetensors")


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_of_the_lab_goes_on_where_it_stopped(data: Pinned, tmp_path: Path) -> None:
    whole = _pretrain(data, tmp_path / "whole")
    _pretrain(data, tmp_path / "stopped", Span(until_epoch=2))
    newest = newest_checkpoint(Location(tmp_path / "stopped"), "pretrain")
    assert newest is not None
    assert newest[0] == 2 * (54 // 18)
    assert len(list((tmp_path / "stopped" / "pretrain").iterdir())) == 2, "old checkpoints stay"
    assert _same(_pretrain(data, tmp_path / "stopped"), whole)
    first = [line["step"] for line in lines(tmp_path / "stopped" / "metrics.jsonl")]
    assert first == list(range(1, 3 * (54 // 18) + 1))


@pytest.mark.parametrize("features", ["train", "pass"])
def test_a_run_that_died_before_its_round_was_frozen_goes_on_with_the_labels_of_that_round(
    features: str, data: Pinned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a checkpoint of later weights, with which no pass gives the features again."""
    rounds = {**CONFIG.rounds.model_dump(), "features": features}
    whole = _pretrain(data, tmp_path / "whole", rounds=rounds)

    def dies(*_: object) -> NoReturn:
        raise RuntimeError("here")

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(LocalRounds, "_make", dies)
        with pytest.raises(RuntimeError, match="here"):
            _pretrain(data, killed, rounds=rounds)
    newest = newest_checkpoint(Location(killed), "pretrain")
    assert newest is not None
    assert newest[0] == 54 // 18 + 1, "a step after the round was asked for"
    assert _same(_pretrain(data, killed, rounds=rounds), whole)
    first, again = (load_round(str(tmp_path / run / "rounds"), 1) for run in ("whole", "killed"))
    for a, b in zip(first.heads, again.heads, strict=True):
        np.testing.assert_array_equal(a.labels_N, b.labels_N)


@pytest.mark.parametrize("goes_on", ["itself", "of older code", "a branch"])
def test_a_run_folder_can_be_moved_on_the_way(goes_on: str, data: Pinned, tmp_path: Path) -> None:
    whole = _pretrain(data, tmp_path / "whole")
    before, moved = tmp_path / "before" / "run", tmp_path / "moved"
    # Until labels are in force: a branch has none of its own to go on with.
    _pretrain(data, before, Span(until_epoch=1))
    before.rename(moved)
    newest = newest_checkpoint(Location(moved), "pretrain")
    assert newest is not None
    if goes_on == "of older code":
        state = state_in(newest[1])
        write_state(state | {"bank": str(before / "rounds" / state["bank"])}, newest[1])
    if goes_on == "a branch":
        assert _same(_pretrain(data, tmp_path / "branch", Span(start=newest[1])), whole)
    else:
        assert _same(_pretrain(data, moved), whole)


@pytest.mark.parametrize(("counted", "then"), [(3, 3), (0, 1)])
def test_banks_of_lost_checkpoints_leave_their_places_to_those_that_count(
    counted: int, then: int, data: Pinned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of steps to come are made again. Also where no checkpoint is left, and the run begins
    anew among its own banks."""
    rarely = {**CONFIG.pretrain.model_dump(), "epochs": 4, "checkpoint_every": 100}
    often = {**rarely, "checkpoint_every": 1}
    whole = _pretrain(data, tmp_path / "whole", pretrain=rarely)
    keep = lab._keep

    def lost(state: dict[str, Any], folder: Path) -> None:
        if state["step"] <= counted:
            keep(state, folder)

    def dies(state: dict[str, Any], folder: Path) -> None:
        if state["step"] > then:
            raise RuntimeError("here")
        keep(state, folder)

    run = tmp_path / "run"
    monkeypatch.setattr(lab, "_keep", lost)
    # Banks of as many epochs as are kept, of which the first has a checkpoint, or none.
    _pretrain(data, run, Span(until_epoch=3), pretrain=rarely)
    monkeypatch.setattr(lab, "_keep", dies)
    with pytest.raises(RuntimeError, match="here"):
        _pretrain(data, run, pretrain=often)
    monkeypatch.setattr(lab, "_keep", keep)
    assert _same(_pretrain(data, run, pretrain=often), whole)


def test_a_copied_run_folder_goes_on_from_its_own_rows(data: Pinned, tmp_path: Path) -> None:
    _pretrain(data, tmp_path / "run", Span(until_epoch=1))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    saved = tmp_path / "copy" / "rounds" / f"bank-{54 // 18:08d}"
    (saved / "manifest.json").unlink()
    with pytest.raises(ClusteringError, match=re.escape(str(saved))):
        _pretrain(data, tmp_path / "copy")


@pytest.mark.parametrize("labels", ["true", "seeded"])
def test_pretraining_from_two_labels_a_class(labels: str, data: Pinned, tmp_path: Path) -> None:
    """Known clips teach their class; the others are left alone, or get a class by clustering."""
    # The second round of three epochs teaches two steps: for one alone it is not made.
    own = {"labels": labels, "labels_per_class": 2, "lead_steps": 1}
    rounds = {**CONFIG.rounds.model_dump(), **own}
    _pretrain(data, tmp_path, rounds=rounds)
    known = few_of_each_class(data.train.labels_N, 2)
    others = np.setdiff1d(np.arange(len(data.train)), known)
    for number in (1, 2):
        [head] = load_round(str(tmp_path / "rounds"), number).heads
        found_N = head.lookup(data.train.keys_N)
        np.testing.assert_array_equal(found_N[known], data.train.labels_N[known])
        assert set(found_N[others]) <= (
            {NO_LABEL} if labels == "true" else set(range(len(data.train.classes)))
        )
    assert [line for line in lines(tmp_path / "metrics.jsonl") if line.get("loss_confusion", 0) > 0]
