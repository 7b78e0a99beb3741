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
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "id", "lease", "run.json"]


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


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a test are attempts of one job, as KubeRay starts them."""
    monkeypatch.setenv("DICCAE_JOB", "diccae/vgg")


def _die(*command: str) -> None:
    """Run a command until it computes."""
    with pytest.raises(Began):
        main(command)


COMMANDS = pytest.mark.parametrize(
    ("command", "trained"),
    [(PRETRAIN, "pretrain/checkpoint_2/new"), (FINETUNE, "finetune/checkpoint_2/new")],
)


@COMMANDS
@pytest.mark.usefixtures("in_job")
def test_the_next_attempt_of_a_job_goes_on_with_what_the_one_before_has_begun_anew(
    command: Sequence[str], trained: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each attempt deleted the checkpoints of the one before."""
    _die(*command)
    assert not (run / TRAINED[-1]).exists()
    RunFolder(run).place.write_bytes(trained, b"epoch 20")
    capsys.readouterr()
    for _ in range(2):
        _die(*command)
        said = [line for line in capsys.readouterr().err.splitlines() if "fresh  " in line]
        assert len(said) == 1
        assert f"an earlier attempt of job diccae/vgg has begun {run} anew" in said[0]
        assert (run / trained).read_bytes() == b"epoch 20"


@pytest.mark.usefixtures("in_job")
def test_an_attempt_that_died_before_it_deleted_leaves_that_to_the_next(
    run: Path, machine: Machine
) -> None:
    for command, trained in ((FINETUNE, TRAINED[-1]), (PRETRAIN, "pretrain/checkpoint_1/old")):
        machine.is_full = True
        assert main(command) == 1
        assert (run / trained).exists()
        machine.is_full = False
        _die(*command)
        assert not (run / trained).exists()


@COMMANDS
def test_a_person_begins_anew_each_time(command: Sequence[str], trained: str, run: Path) -> None:
    for _ in range(2):
        _die(*command)
        assert not (run / trained).exists()
        RunFolder(run).place.write_bytes(trained, b"new")


@COMMANDS
@pytest.mark.usefixtures("in_job")
def test_another_job_of_the_same_name_begins_anew(
    command: Sequence[str], trained: str, run: Path
) -> None:
    """One of other words, or of a config that was edited since; or a person's start between."""
    place = RunFolder(run).place
    for words in (command, [*command, "--scale.num-workers", "1"], command):
        _die(*words)
        assert not (run / trained).exists()
        place.write_bytes(trained, b"new")
    edited = TUNED.model_copy(update={"mixup": 0.25})
    for file in ("run.yaml", "run/config.yaml"):
        Path(file).write_text(config_text(RECIPE.model_copy(update={"finetune": edited})))
    _die(*command)
    assert not (run / trained).exists()
    place.write_bytes(trained, b"new")
    with pytest.MonkeyPatch.context() as alone:
        alone.delenv("DICCAE_JOB")
        _die(*command)
    place.write_bytes(trained, b"new")
    _die(*command)
    assert not (run / trained).exists()


@COMMANDS
@pytest.mark.usefixtures("in_job")
def test_a_job_that_succeeded_is_followed_by_one_that_begins_anew(
    command: Sequence[str], trained: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _die(*command)
    RunFolder(run).place.write_bytes(trained, b"new")
    stage, name = (pretrain, "run_pretrain") if command is PRETRAIN else (finetune, "run_finetune")
    with monkeypatch.context() as whole:
        whole.setattr(stage, name, lambda *_, **__: None)
        assert main(command) == 0
    assert (run / trained).exists()
    _die(*command)
    assert not (run / trained).exists()
