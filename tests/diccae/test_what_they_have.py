"""`diccae ingest --videos DIR` of clips without a list, and what unlabelled clips are good for."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import SMOKE
from support.stores import noise_store

from diccae.cli import main
from diccae.config import load_config
from pipeline.store.store import FeatureStore
from pipeline.synth import write_clips

Diccae = Callable[..., str]
N_CLIPS = 48


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips in two folders, 0000.mp4 to 0023.mp4 in each."""
    place = tmp_path_factory.mktemp("they-have")
    write_clips(place / "made", n_train=N_CLIPS, n_test=0, seed=1, size=64)
    for i, file in enumerate(sorted((place / "made" / "videos").iterdir())):
        folder = place / "videos" / ("left", "right")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / f"{i // 2:04d}.mp4")
    return place / "videos"


@pytest.fixture(scope="module")
def unlabelled(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The store of these clips, with the features of the smoke config."""
    store = str(tmp_path_factory.mktemp("store") / "store")
    assert main(["ingest", "--videos", str(clips), "--store", store, "--config", SMOKE]) == 0
    return store


@pytest.fixture(autouse=True)
def no_ray_for_small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("diccae.stages.ingest.start_ray", refuse)


def test_every_clip_of_a_folder_is_ingested_and_a_later_list_only_names_them(
    clips: Path, unlabelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(shutil.copytree(unlabelled, tmp_path / "store"))
    rows = FeatureStore.open(store).snapshot().rows("train")
    assert len(rows) == N_CLIPS
    assert {"left__0000", "right__0000"} <= set(rows["clip_id"].to_pylist())
    assert FeatureStore.open(store).snapshot().classes == []
    lines = [f"{side}/{i:04d}.mp4,{side},recording {i % 5}" for side in ("left", "right")
             for i in range(N_CLIPS // 2)]  # fmt: skip
    (tmp_path / "list.csv").write_text("\n".join(["uri,label,group", *lines]))
    capsys.readouterr()
    source = ["--clips", str(tmp_path / "list.csv"), "--videos", str(clips)]
    assert main(["ingest", *source, "--store", store, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["changed"], said["ok"], said["new"]) == (N_CLIPS, 0, 0), "decoded again"
    snapshot = FeatureStore.open(store).snapshot()
    assert snapshot.classes == ["left", "right"]
    assert set(snapshot.rows(None)["group"].to_pylist()) == {f"recording {i}" for i in range(5)}


def test_label_from_folder_labels_without_decoding_again(
    clips: Path,
    unlabelled: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = str(shutil.copytree(unlabelled, tmp_path / "store"))
    arguments = ["--videos", str(clips), "--store", store, "--label-from-folder", "--json"]
    capsys.readouterr()
    assert main(["ingest", *arguments, "--plan"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == N_CLIPS
    assert main(["ingest", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] == 0
    assert FeatureStore.open(store).snapshot().classes == ["left", "right"]
    # The same line without the option, as it is easily typed.
    arguments.remove("--label-from-folder")
    capsys.readouterr()
    assert main(["ingest", *arguments, "--plan"]) == 0
    assert f"{N_CLIPS} clips lose the label" in caplog.text


def test_a_plan_says_whether_another_spec_comes_into_force(
    clips: Path, unlabelled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ingest", "--videos", str(clips), "--store", unlabelled, "--plan"]
    for options, comes in (([], False), (["--features.n-frames", "2"], True)):
        capsys.readouterr()
        assert main([*arguments, *options, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["puts_in_force"] is comes
        assert main([*arguments, *options]) == 0
        assert ("come into force" in capsys.readouterr().out) is comes


def test_nothing_can_be_left_out_of_a_store_that_is_yet_to_be_made(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ingest", "--videos", str(clips), "--store", str(tmp_path / "store")]
    for rule, code, said in (("still", 1, "no quality table"), ("stil", 2, "no rule 'stil'")):
        assert main([*arguments, "--ingest.leave-out", rule]) == code
        assert said in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_source_that_cannot_be_is_one_line_and_leaves_no_store(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.csv").write_text("uri,split\na.mp4,../../x\n")
    (tmp_path / "away.csv").write_text("uri\nnot/here.mp4\n")
    for source, said in (
        ([], "give --videos FOLDER"),
        (["--videos", str(tmp_path)], "no videos there"),
        (["--clips", str(tmp_path / "list.csv")], "'../../x' is not a split: it holds a path"),
        (["--clips", str(tmp_path / "away.csv")], f"such as {tmp_path}/not/here.mp4"),
        (["--clips", "x.csv", "--videos", str(clips), "--label-from-folder"], "leave out"),
    ):
        assert main(["ingest", *source, "--store", str(tmp_path / "store")]) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.count("\n") == 1
    assert not (tmp_path / "store").exists()


@pytest.fixture
def pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder that pinned a store without labels; its encoder was never trained."""
    noise_store(tmp_path / "store", load_config(SMOKE).features, 64, labelled=False)
    return _run_on_store(tmp_path, monkeypatch)


def _run_on_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from diccae.run_folder import RunFolder
    from diccae.stages.run_record import pin_for, remember

    config = load_config(SMOKE)
    monkeypatch.chdir(tmp_path)
    store = "store"
    folder = RunFolder(tmp_path / "run")
    folder.open(config, fresh=False)
    remember(folder, config, pin_for(folder, config, store))
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_what_needs_labels_says_so_by_name_before_the_cluster_is_used(
    command: str,
    pretrained: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    monkeypatch.setattr("diccae.stages.backend.start_ray", lambda: started.append("ray"))
    monkeypatch.chdir(pretrained)  # The store was named as in another folder.
    assert main([command, "--out", str(pretrained)]) == 1
    printed = capsys.readouterr().err
    assert f"diccae {command}: {command}" in printed
    assert "needs labels, and none of the 64 clips of" in printed
    assert printed.count("\n") == 1
    assert not started


def test_several_labels_a_clip_are_refused_before_the_cluster_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr("diccae.stages.backend.start_ray", lambda: started.append("ray"))
    noise_store(tmp_path / "store", load_config(SMOKE).features, 64, more="loud")
    run = _run_on_store(tmp_path, monkeypatch)
    assert main(["finetune", "--out", str(run)]) == 1
    printed = capsys.readouterr().err
    assert "64 clips of the train split have several labels" in printed
    assert "set finetune.loss to bce" in printed
    assert not started


def test_true_labels_as_a_control_are_refused_by_name(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", SMOKE, "--store", str(tmp_path / "store"), "--out"]
    assert main(["pretrain", *arguments, str(tmp_path / "a"), "--rounds.labels", "true"]) == 1
    printed = capsys.readouterr().err
    assert "rounds.labels = true needs labels, and none of the 64 clips of" in printed
    assert printed.count("\n") == 1
    assert main(["ablate", *arguments, str(tmp_path / "b"), "--variants", "full"]) == 1
    printed = capsys.readouterr().err
    assert "evaluate (its probes learn from the train split) needs labels" in printed
    assert printed.count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_unlabelled_clips_pretrain_and_their_vectors_are_embedded(
    unlabelled: str, diccae: Diccae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--pretrain.epochs", "3", "--pretrain.batch-size", "16"]
    diccae("pretrain", "--config", SMOKE, "--store", unlabelled, "--out", "run", *options)
    results = json.loads(Path("run/results.json").read_text())
    assert results["n_train"] == N_CLIPS
    assert results["pseudo_labels"]["rounds"] >= 1
    arguments = ["--store", unlabelled, "--encoder", "run/encoder", "--config", SMOKE]
    diccae("embed", *arguments, "--split", "train", "--out", "vectors.parquet")
    assert os.path.getsize("vectors.parquet") > 0
    assert Path(diccae("report", "--out", "run").strip()).stat().st_size > 10_000
