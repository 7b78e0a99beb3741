"""A run whose store was moved, or that is told of another one."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.idle import CONFIG, SPEC, Began, Idle
from support.stores import noise_store

from diccae.cli import main
from diccae.config import config_text
from diccae.run_folder import RunFolder
from diccae.stages import pretrain
from diccae.stages.run_record import pin_for, remember
from pipeline.errors import PipelineError
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.store import FeatureStore
from training.errors import TrainingError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that began on `store`, beside `run.yaml`."""
    monkeypatch.chdir(tmp_path)
    noise_store(tmp_path / "store", SPEC, 8)
    Path("run.yaml").write_text(config_text(CONFIG))
    folder = RunFolder("run")
    folder.open(CONFIG, fresh=False)
    remember(folder, CONFIG, pin_for(folder, CONFIG, "store"))
    idle = functools.partial(pretrain.run_pretrain, backend=Idle())  # type: ignore[arg-type]
    monkeypatch.setattr(pretrain, "run_pretrain", idle)
    return tmp_path / "run"


def _pretrain(store: str) -> int:
    return main(["pretrain", "--config", "run.yaml", "--out", "run", "--store", store])


def _known(run: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((run / "run.json").read_text())["store"]
    return known


def test_a_run_goes_on_where_its_store_was_moved_to(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _known(run)
    Path("store").rename("moved")
    with pytest.raises(Began):
        _pretrain("moved")
    moved = str(run.parent / "moved")
    assert f"8 clips of {moved} version {before['version']}" in capsys.readouterr().err
    assert _known(run) == before | {"uri": moved}
    assert pin_for(RunFolder(run), CONFIG).snapshot.uri == moved


def _finetune(store: str) -> int:
    return main(["finetune", "--out", "run", "--store", store])


def _evaluate(store: str) -> int:
    return main(["evaluate", "--out", "run", "--store", store])


@pytest.mark.parametrize("command", [_pretrain, _finetune, _evaluate])
def test_another_store_than_the_runs_is_refused(
    run: Path, command: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = _known(run)
    other = noise_store(run.parent / "other", SPEC, 4)
    short = FeatureStore.create(str(run.parent / "short"), SPEC)
    for store, said in ((other, "other clips in that version"), (short, "does not have it")):
        assert command(store.uri) == 2
        told = capsys.readouterr().err
        assert f"--store {store.uri}: the run in {run} reads version 1 of {before['uri']}" in told
        assert said in told
    assert _known(run) == before
    assert not other.pins()


def test_a_copy_that_has_grown_since_is_the_runs_store_all_the_same(run: Path) -> None:
    shutil.copytree("store", "copy")
    store = FeatureStore.open("copy")
    gone = store.snapshot().clips.to_pylist()[0] | {"status": "removed"}
    store.append(pa.Table.from_pylist([gone], CLIPS_SCHEMA), {})
    with pytest.raises(Began):
        _pretrain("copy")
    assert _known(run)["uri"] == str(run.parent / "copy")


@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_a_folder_whose_run_never_began_is_told_so_and_left_as_it_is(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(config_text(CONFIG))
    assert main([command, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert ("diccae pretrain --out" if command == "evaluate" else "--store") in said
    assert "--store" not in said or command == "finetune"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_run_that_is_begun_anew_lets_go_of_what_the_old_one_read(run: Path) -> None:
    store = FeatureStore.open("store")
    (old,) = store.pins()
    gone = store.snapshot().clips.to_pylist()[0] | {"status": "removed"}
    newest = store.append(pa.Table.from_pylist([gone], CLIPS_SCHEMA), {})
    with pytest.raises(Began):
        main(["pretrain", "--config", "run.yaml", "--out", "run", "--store", "store", "--fresh"])
    assert list(store.pins().values()) == [newest]
    assert old not in store.pins()


def _starts(out: str) -> list[list[str]]:
    return [
        ["pretrain", "--config", "run.yaml", "--out", out, "--store", "store"],
        ["finetune", "--config", "run.yaml", "--out", out],
        ["evaluate", "--out", out],
    ]


@pytest.mark.parametrize("command", [0, 1, 2], ids=["pretrain", "finetune", "evaluate"])
def test_a_run_that_was_moved_has_its_pin_where_it_is_now(
    command: int, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`store unpin --gone` asks the place that a pin names; a vacuum takes what no pin holds."""
    store = FeatureStore.open("store")
    (old,) = store.pins()
    run.rename("moved")
    with contextlib.suppress(Began, PipelineError, TrainingError):
        main(_starts("moved")[command])  # It has no encoder yet: how it ends is not asked here.
    assert main(["store", "unpin", "--store", "store", "--gone"]) == 0
    (new,) = store.pins()
    assert new != old
    assert store.pins_in_full()[new]["run"] == str(run.parent / "moved")


def test_a_moved_run_of_a_store_that_may_only_be_read_is_begun_with_a_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run.rename("moved")
    monkeypatch.setattr(FeatureStore, "pin", read_only)
    with pytest.raises(Began):
        main(_starts("moved")[0])
    printed = capsys.readouterr().err
    assert "version 1 is not pinned for the run in" in printed
    assert "a vacuum may take it: [Errno 30] Read-only file system" in printed


def test_runs_of_one_path_on_two_machines_have_a_pin_each(run: Path) -> None:
    """Two workstations with one store: what one let go of, a vacuum took from the other."""
    store = FeatureStore.open("store")
    (of_the_other,) = store.pins()
    run.rename("elsewhere")  # The path is free here, as on another machine.
    with pytest.raises(Began):
        _pretrain("store")
    assert len(store.pins()) == 2
    gone = store.snapshot().clips.to_pylist()[0] | {"status": "removed"}
    newest = store.append(pa.Table.from_pylist([gone], CLIPS_SCHEMA), {})
    old = store.pins()[of_the_other]
    with pytest.raises(Began):
        main(["pretrain", "--config", "run.yaml", "--out", "run", "--store", "store", "--fresh"])
    assert sorted(store.pins().values()) == [old, newest]
    assert of_the_other in store.pins()


def test_a_run_that_an_earlier_version_pinned_lets_go_of_its_pin(run: Path) -> None:
    """By the path alone."""
    store = FeatureStore.open("store")
    ((name, version),) = store.pins().items()
    store.unpin(name)
    (run / "id").unlink()
    old = f"run-run-v{version}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"
    store.pin(version, old, str(run))
    with pytest.raises(Began):
        _pretrain("store")
    assert set(store.pins()) == {old}, "gone on with"
    with pytest.raises(Began):
        main(["pretrain", "--config", "run.yaml", "--out", "run", "--store", "store", "--fresh"])
    assert set(store.pins()) & {old} == set()
    assert len(store.pins()) == 1
