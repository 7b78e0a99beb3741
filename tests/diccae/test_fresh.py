"""--fresh: what it deletes, and when."""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.idle import CONFIG, SPEC, Began, Idle
from support.stores import noise_store

from diccae.cli import main
from diccae.config import config_text
from diccae.errors import ResourceError
from diccae.run_folder import RunFolder
from diccae.stages import finetune, pretrain
from diccae.stages.run_record import pin_for, remember
from pipeline.store.store import FeatureStore

TUNED = CONFIG.finetune.model_copy(update={"batch_size": 4})
RECIPE = CONFIG.model_copy(update={"finetune": TUNED})
PRETRAIN = ("pretrain", "--config", "run.yaml", "--out", "run", "--store", "store", "--fresh")
FINETUNE = ("finetune", "--out", "run", "--fresh")
LABELS = ("--rounds.labels", "random", "--pretrain.epochs", "9", "--rounds.lead-steps", "0")
TRAINED = ("finetune.jsonl", "classifier/classifier.json", "finetune/checkpoint_1/old")
"""Of fine-tuning; what a test says of pretraining lies in `pretrain/`."""


class Machine(Idle):
    """A cluster that has room, or none."""

    attach = Idle.track
    finetune = Idle.watched_nodes

    def __init__(self) -> None:
        self.is_full = False

    def ready(self, *_: Any) -> None:
        """Raises: ResourceError."""
        if self.is_full:
            raise ResourceError("the cluster has 0 CPUs")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Where the stages of commands get as far as their computation."""
    machine = Machine()
    for stage, name in ((pretrain, "run_pretrain"), (finetune, "run_finetune")):
        there = functools.partial(getattr(stage, name), backend=machine)
        monkeypatch.setattr(stage, name, there)
    return machine


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Path:
    """A run that was pretrained and fine-tuned on `store`, beside `run.yaml`."""
    monkeypatch.chdir(tmp_path)
    noise_store(tmp_path / "store", SPEC, 8)
    Path("run.yaml").write_text(config_text(RECIPE))
    folder = RunFolder("run")
    folder.open(RECIPE, fresh=False)
    remember(folder, RECIPE, pin_for(folder, RECIPE, "store"))
    for name in (*TRAINED, "pretrain/checkpoint_1/old"):
        folder.place.write_bytes(name, b"old")
    return tmp_path / "run"


def _held(run: Path) -> dict[str, bytes]:
    """What a run folder holds, and the pins of its store."""
    there = [path for path in run.rglob("*") if path.is_file() and path.parent.name != "lease"]
    pins = FeatureStore.open(str(run.parent / "store")).pins()
    return {str(path): path.read_bytes() for path in there} | {"pins": repr(pins).encode()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--init", "typo.pth"], "typo.pth"),
        ([*LABELS, "--clustering.k", "5"], "clustering.k = 5"),
        (["--data.frames-per-clip", "9"], "data.frames_per_clip = 9"),
        (["--store", "typo"], "typo"),
        (["--store", "run/store"], "--store run/store lies in --out"),
        (["--scale.num-workers", "1"], "the cluster has 0 CPUs"),
    ],
)
def test_a_run_that_cannot_be_begun_anew_stays(
    change: Sequence[str],
    said: str,
    run: Path,
    machine: Machine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was deleted first, and then the command was refused."""
    machine.is_full = "0 CPUs" in said
    if "run/store" in change:
        shutil.copytree("store", "run/store")
        said = said.replace("run/store", str(run / "store"))
    before = _held(run)
    assert main([*PRETRAIN, *change]) != 0
    assert said in capsys.readouterr().err
    assert _held(run) == before


def test_a_run_that_is_begun_anew_goes_with_all_that_it_held(run: Path) -> None:
    with pytest.raises(Began):
        main(PRETRAIN)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "lease", "run.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--data.frames-per-clip", "2"], "data.frames_per_clip: 1 -> 2"),
        (["--encoder", "typo"], "typo"),
        (["--store", "typo"], "typo"),
        (["--finetune.optim.lr", "0.003"], "the cluster has 0 CPUs"),
    ],
)
def test_a_classifier_that_cannot_be_trained_anew_stays(
    change: Sequence[str],
    said: str,
    run: Path,
    machine: Machine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine.is_full = "0 CPUs" in said
    before = _held(run)
    assert main([*FINETUNE, *change]) != 0
    assert said in capsys.readouterr().err
    after = _held(run)
    # What was found of the store's fbanks may be written down.
    known = str(run / "run.json")
    assert {**after, known: b""} == {**before, known: b""}


def test_a_classifier_that_is_trained_anew_goes_and_the_encoder_stays(run: Path) -> None:
    with pytest.raises(Began):
        main([*FINETUNE, "--finetune.optim.lr", "0.003"])
    assert not any((run / name).exists() for name in TRAINED)
    assert (run / "pretrain/checkpoint_1/old").exists()
    assert RunFolder(run).config().finetune.optim.lr == 0.003


def test_a_demo_that_cannot_begin_leaves_the_old_one(run: Path) -> None:
    before = _held(run)
    assert main(["demo", "--out", str(run.parent), "--data", "nowhere", "--fresh"]) == 2
    assert _held(run) == before
