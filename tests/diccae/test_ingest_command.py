"""`diccae ingest` as it is typed, over files of text: what it says, refuses and leaves alone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from support.cheap_source import CHEAP_SPECS, CheapSource

from diccae.cli import main
from diccae.config import config_text, load_config
from diccae.errors import UsageError
from diccae.resources import Node
from diccae.stages import ingest
from pipeline.store.maintenance import status
from pipeline.store.store import FeatureStore

OLD, NEW = CHEAP_SPECS
ANOTHER_SPEC = ["--features.n-frames", str(NEW.n_frames)]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheapSource:
    """Four clips, two of them in a folder of their own, ingested without a list."""
    made = CheapSource(tmp_path, 4, monkeypatch)
    (made.file("c0").parent / "b").mkdir()
    for clip in ("c2", "c3"):
        made.file(clip).rename(made.file(f"b/{clip}"))
    made.ingest_folder(OLD)
    return made


def command(source: CheapSource, *options: str) -> list[str]:
    videos = str(source.folder / "videos")
    return ["ingest", "--videos", videos, "--store", source.store, "--json", *options]


def answer(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The JSON line on stdout, and what stands on stderr."""
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def two_files_of_one_name(source: CheapSource, monkeypatch: pytest.MonkeyPatch) -> None:
    for clip in ("c2", "c3"):
        source.file(f"b/{clip}").with_suffix(".mkv").write_text("good")


def a_folder_that_gives_io_errors(source: CheapSource, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def failing(path: Any) -> Any:
        if str(path).endswith("/b"):
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)


@pytest.mark.parametrize("hide", [two_files_of_one_name, a_folder_that_gives_io_errors])
def test_another_spec_does_not_come_into_force_without_clips_that_cannot_be_read(
    hide: Any,
    source: CheapSource,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = FeatureStore.open(source.store).snapshot().digest
    with monkeypatch.context() as patch:
        hide(source, patch)
        assert main(command(source, *ANOTHER_SPEC, "--plan")) == 0
        plan, _ = answer(capsys)
        assert (plan["puts_in_force"], plan["out_of_reach"]["clips"]) == (False, 2)
        # The same again, which finds nothing to decode, is no way around.
        for n_decoded in (2, 0):
            assert main(command(source, *ANOTHER_SPEC)) == 2
            said, told = answer(capsys)
            assert (said["ok"], said["set_aside"]) == (n_decoded, 2)
            assert said["unchanged"] == 2 - n_decoded
            assert "2 clips of the data set have no such features" in told
            assert f"{source.folder}/videos/b" in told
            assert FeatureStore.open(source.store).snapshot().digest == before
        assert main(command(source)) == 0, "of the spec in force nothing is asked that is not there"
        assert answer(capsys)[0]["set_aside"] == 2
    for spare in (source.folder / "videos" / "b").glob("*.mkv"):
        spare.unlink()
    assert main(command(source, *ANOTHER_SPEC)) == 0
    assert answer(capsys)[0]["ok"] == 2, "what was decoded before is kept"
    assert FeatureStore.open(source.store).snapshot().spec == NEW
    assert status(source.store)["ok"] == 4


def test_clips_that_cannot_be_read_and_have_the_features_keep_no_spec_out_of_force(
    source: CheapSource, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source.ingest_folder(NEW)
    two_files_of_one_name(source, monkeypatch)
    assert main(command(source, "--features.n-frames", str(OLD.n_frames))) == 0
    assert FeatureStore.open(source.store).snapshot().spec == OLD
    assert status(source.store)["ok"] == 4


def test_labels_that_clips_lose_as_they_are_decoded_again_are_told(
    source: CheapSource, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(command(source, "--label-from-folder")) == 0
    assert FeatureStore.open(source.store).snapshot().classes == ["b"]
    caplog.clear()
    assert main(command(source, *ANOTHER_SPEC, "--plan")) == 0
    assert "2 clips lose the label they have in the store" in caplog.text


def test_a_plan_counts_a_vanished_file_once_and_as_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = CheapSource(tmp_path, 6, monkeypatch)
    source.ingest(OLD)
    source.file("c0").unlink()
    listed = ["--clips", str(tmp_path / "clips.csv")]
    assert main(command(source, *listed, "--plan")) == 0
    plan, _ = answer(capsys)
    assert main(command(source, *listed)) == 0
    said, _ = answer(capsys)
    assert (said["removed"], said["missing"], said["unchanged"]) == (1, 0, 5)
    assert {name: said[name] for name in plan if name in said} == {
        name: n for name, n in plan.items() if name in said
    }


def test_a_probe_belongs_to_a_plan(
    source: CheapSource, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("containers are read for nothing")

    monkeypatch.setattr("pipeline.ingest.probe.probe_timelines", refuse)
    assert main(command(source, *ANOTHER_SPEC, "--probe")) == 2
    told = capsys.readouterr().err
    assert "--probe belongs to --plan" in told
    assert told.count("\n") == 1
    with pytest.raises(AssertionError, match="containers are read"):
        main(command(source, *ANOTHER_SPEC, "--probe", "--plan"))


@pytest.mark.parametrize("key", ["probe", "allow_mass_delete"])
def test_what_is_meant_for_one_call_is_no_key_of_a_config(
    key: str, source: CheapSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A probe made every ingest of the config fail; deletions were let through for ever."""
    for clip in ("c0", "c1"):
        source.file(clip).unlink()
    config = tmp_path / "c.yaml"
    with_config = command(source, "--config", str(config))
    config.write_text(f"ingest: {{{key}: true}}")
    assert main(with_config) == 2
    told = capsys.readouterr().err
    option = f"--{key.replace('_', '-')}"
    assert f"{config}: ingest.{key} is no key of a config any more" in told
    assert f"give diccae ingest {option}" in told
    # As each config stands that was saved with a run before.
    config.write_text(f"ingest: {{{key}: false}}")
    assert main(with_config) == 2
    assert "Use --allow-mass-delete" in capsys.readouterr().err
    assert main([*with_config, "--allow-mass-delete"]) == 0
    assert answer(capsys)[0]["removed"] == 2


def test_what_makes_other_features_is_no_key_of_a_config(
    source: CheapSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    with_config = command(source, "--config", str(config))
    config.write_text("ingest: {extractor: 'my.own:extract'}")
    assert main(with_config) == 2
    told = capsys.readouterr().err
    assert f"{config}: ingest.extractor: my.own:extract is no key of a config any more" in told
    with pytest.raises(SystemExit, match="2"):
        main(command(source, "--ingest.extractor", "my.own:extract"))
    assert "Unrecognized options: --ingest.extractor" in capsys.readouterr().err
    # As each config stands that was saved with a run before.
    config.write_text("ingest: {extractor: 'pipeline.decode.clip:extract'}")
    assert main(with_config) == 0
    assert "extractor" not in config_text(load_config(config))


def test_of_two_first_ingests_at_once_one_makes_the_store(
    source: CheapSource, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source.store += "-again"
    about = Path(source.store, "store.json")
    create, made = DeltaTable.create, []

    def slow(*args: Any, **options: Any) -> DeltaTable:
        table = create(*args, **options)
        if not made:
            made.append(b"under way")
            assert main(command(source)) == 0, "the other one, which is faster"
            made.append(about.read_bytes())
        return table

    monkeypatch.setattr(DeltaTable, "create", slow)
    assert main(command(source)) == 0
    assert made == [b"under way", about.read_bytes()]
    counts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["new"], one["unchanged"]) for one in counts] == [(4, 0), (0, 4)]


@pytest.mark.parametrize("is_beside_a_cluster", [False, True])
def test_more_clips_than_a_cluster_is_worth_are_decoded_here_on_a_machine_alone(
    is_beside_a_cluster: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """65 files that fail at once: one more than what is decoded here beside a cluster."""
    videos, store = tmp_path / "videos", str(tmp_path / "store")
    videos.mkdir()
    for i in range(65):
        (videos / f"c{i}.mp4").write_text("no video")

    def join() -> None:
        raise UsageError("a cluster was asked for")

    monkeypatch.setattr(ingest, "start_ray", join)
    if is_beside_a_cluster:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    typed = ["ingest", "--videos", str(videos), "--store", store, "--ingest.max-failed-frac", "1"]
    code = main(typed)
    assert ("a cluster was asked for" in capsys.readouterr().err) == is_beside_a_cluster
    assert (code, status(store)["failed"]) == ((2, 0) if is_beside_a_cluster else (0, 65))


@pytest.mark.parametrize("has_nodes", [False, True])
def test_an_ingest_on_groups_of_no_nodes_says_what_it_waits_for(
    has_nodes: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A node takes minutes to come, and nothing was said until its first clip."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "c.mp4").write_text("no video")
    monkeypatch.setenv("DICCAE_AUTOSCALING_GROUPS", '[{"nodes": 1, "cpus": 4, "gpus": 0}]')
    head = [Node(cpus=0.0, gpus=0.0)]
    monkeypatch.setattr(ingest, "start_ray", lambda: None)
    up = [*head, Node(cpus=4.0, gpus=0.0)] if has_nodes else head
    monkeypatch.setattr(ingest, "nodes_up", lambda: up)

    def reached(_: object) -> None:
        raise UsageError("nodes are asked what they reach")

    monkeypatch.setattr(ingest, "check_reach", reached)
    typed = ["ingest", "--videos", str(tmp_path / "videos"), "--store", str(tmp_path / "store")]
    assert main([*typed, "--ingest.local-clips", "0"]) == 2
    assert ("waiting   for the first node" in capsys.readouterr().err) != has_nodes


def test_a_reason_that_there_is_not_is_refused_wherever_it_is_given(
    source: CheapSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command(source, "--ingest.retry-reasons", "timeout", "tired"))
    assert stopped.value.code == 2
    config = tmp_path / "c.yaml"
    config.write_text("ingest: {retry_reasons: [tired]}")
    assert main(command(source, "--config", str(config))) == 2
    assert "ingest.retry_reasons.0: Input should be 'missing', 'open_" in capsys.readouterr().err
    source.file("c1").write_text("bad")
    assert main([word for word in command(source, "--plan") if word != "--json"]) == 0
    assert "to decode                1  of all these" in capsys.readouterr().out
    assert main(command(source)) == 3
    for reasons, n_retried in ((["timeout"], 0), (["timeout", "open_failed"], 1)):
        capsys.readouterr()
        assert main(command(source, "--plan", "--ingest.retry-reasons", *reasons)) == 0
        plan, _ = answer(capsys)
        assert (plan["retried"], plan["to_decode"]) == (n_retried, n_retried)
