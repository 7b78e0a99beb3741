"""`diccae store` as it is typed: what an action takes, and that it does that."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.cheap_source import CHEAP_SPECS, CheapSource
from support.stores import noise_store

from diccae.cli import main
from pipeline.config import FeatureSpec
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.store import FeatureStore

OLD, NEW = CHEAP_SPECS


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheapSource:
    """Four clips, ingested without a list."""
    made = CheapSource(tmp_path, 4, monkeypatch)
    made.ingest_folder(OLD)
    return made


def test_clips_that_keep_another_spec_out_of_force_are_listed_as_the_run_says(
    source: CheapSource, capsys: pytest.CaptureFixture[str]
) -> None:
    source.file("c0").write_text("bad")
    source.file("c1").write_text("slow")
    arguments = ["--videos", str(source.folder / "videos"), "--store", source.store]
    assert main(["ingest", *arguments, "--features.n-frames", str(NEW.n_frames)]) == 3
    named = re.search(r'"diccae (store failures .*?)"', capsys.readouterr().err)
    assert named
    failures = [*shlex.split(named[1]), "--json"]
    assert main(failures) == 0
    found = json.loads(capsys.readouterr().out)
    assert {reason: one["clips"] for reason, one in found.items()} == {
        "open_failed": 1, "timeout": 1,
    }  # fmt: skip
    assert main([*failures, "--reason", "timeout", "--examples", "0"]) == 0
    assert json.loads(capsys.readouterr().out) == {"timeout": {"clips": 1, "examples": []}}
    assert main(["store", "failures", "--store", source.store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {}, "none of the spec in force"
    hashes = ", ".join(sorted(spec.spec_hash() for spec in CHEAP_SPECS))
    for option, value, said in (
        ("--spec", "0123", f"no clip was decoded for spec '0123'; there are {hashes}"),
        ("--reason", "tired", "no reason 'tired'; there are missing, open_failed"),
        ("--examples", "-1", "-1 examples of a reason; 0 or more are allowed"),
    ):
        assert main(["store", "failures", "--store", source.store, option, value]) == 1
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.count("\n") == 1


def test_an_older_version_is_exported_measured_and_asked_for_its_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = noise_store(tmp_path / "store", FeatureSpec(n_frames=1, frame_size=16), 4)
    older = store.version()
    gone, failed, *_ = store.snapshot().clips.to_pylist()
    gone["status"] = "removed"
    failed |= {"status": "failed", "reason": "open_failed"}
    store.append(pa.Table.from_pylist([gone, failed], CLIPS_SCHEMA), {})

    def answers(*version: str) -> list[int]:
        found = []
        for action, name in (("export", "clips"), ("stats", "clips"), ("failures", "open_failed")):
            options = list(version)
            if action == "export":
                options += ["--out", str(tmp_path / f"out{len(version)}")]
            assert main(["store", action, "--store", store.uri, "--json", *options]) == 0
            found.append(json.loads(capsys.readouterr().out).get(name, 0))
        return found

    assert answers("--version", str(older)) == [4, 4, 0]
    assert answers() == [2, 2, {"clips": 1, "examples": [example(failed)]}]
    assert len(list((tmp_path / "out2" / "train").iterdir())) == 4


@pytest.fixture
def vacuumed(source: CheapSource) -> tuple[str, list[int]]:
    """A store and five versions, of which vacuum has left the second, which is pinned, the fourth,
    whose shards the newest needs, too, and the newest."""
    versions = [FeatureStore.open(source.store).version()]
    for content in ("second", "third", "fourth", "fifth"):
        # One clip stays, so that each version shares a shard with the others.
        for clip in source.clips[:3] if content != "fifth" else ["c4"]:
            source.file(clip).write_text(f"g {content}")
        versions.append(source.ingest_folder().version)
    FeatureStore.open(source.store).pin(versions[1], "run-1")
    assert main(["store", "vacuum", "--store", source.store, "--retention-hours", "0"]) == 0
    return source.store, versions


def test_a_version_that_was_vacuumed_says_so_and_which_are_whole(
    vacuumed: tuple[str, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, (gone, pinned, gone_too, young, newest) = vacuumed
    for version in (gone, gone_too):
        for action in ("status", "export", "stats"):
            out = ["--out", str(tmp_path / "out")] if action == "export" else []
            capsys.readouterr()
            arguments = ["store", action, "--store", store, "--version", str(version), *out]
            assert main(arguments) == 1
            said = capsys.readouterr().err
            assert f"version {version} was vacuumed: " in said
            assert f"Whole are {pinned}, {young} to {newest}: name one of them" in said
            assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    for version in (pinned, young, newest):
        assert main(["store", "status", "--store", store, "--version", str(version)]) == 0


def test_a_version_whose_log_was_vacuumed_says_so(
    source: CheapSource, capsys: pytest.CaptureFixture[str]
) -> None:
    first = FeatureStore.open(source.store).version()
    source.file("c0").write_text("g2")
    source.ingest_folder()
    assert main(["store", "compact", "--store", source.store]) == 0
    assert main(["store", "vacuum", "--store", source.store, "--retention-hours", "0"]) == 0
    newest = FeatureStore.open(source.store).version()
    capsys.readouterr()
    assert main(["store", "status", "--store", source.store, "--version", str(first)]) == 1
    said = capsys.readouterr().err
    assert f"version {first} was vacuumed: 2 of its 2 log files are gone." in said
    assert f"or none for {newest}, the newest" in said
    assert said.count("\n") == 1


def test_a_shard_that_the_newest_version_lacks_too_is_no_vacuum(
    source: CheapSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FeatureStore.open(source.store)
    version = store.version()
    source.clips.append("c4")
    source.file("c4").write_text("good")
    source.ingest_folder()
    for shard in store.snapshot(version).shards():
        Path(source.store, shard).unlink()
    arguments = ["store", "export", "--store", source.store, "--version", str(version)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "was vacuumed" not in said
    assert "--repair" in said


def example(clip: dict[str, object]) -> dict[str, object]:
    return {name: clip[name] for name in ("clip_id", "uri", "detail")}


@pytest.mark.parametrize(
    ("action", "option", "actions"),
    [
        ("compact", "--dry-run", "vacuum, unpin"),
        ("status", "--split=test", "quality, stats"),
        ("verify", "--version=1", "status, failures, stats, export, pin"),
    ],
)
def test_an_option_that_an_action_does_not_take_is_refused_by_name(
    action: str, option: str, actions: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["store", action, "--store", str(tmp_path / "store"), option]) == 2
    printed = capsys.readouterr().err
    name = option.partition("=")[0]
    assert f"{name} is no option of {action}, but of {actions}; leave it out" in printed
    assert printed.count("\n") == 1


def _said(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["store", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_versions_are_listed_with_what_made_them_and_who_keeps_them(
    vacuumed: tuple[str, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    uri, (gone, pinned, gone_too, young, newest) = vacuumed
    found = {one["version"]: one for one in _said(capsys, "versions", "--store", uri)}
    assert list(found) == list(range(newest, -1, -1))
    clips = [found[version]["clips"] for version in (gone, pinned, gone_too, young, newest)]
    assert clips == [None, 4, None, 4, 5]
    assert found[pinned]["pins"] == ["run-1"]
    assert found[0]["by"] == "store made"
    assert found[newest]["by"].startswith("ingest ")
    assert {one["spec"] for one in found.values()} == {OLD.spec_hash()}
    few = _said(capsys, "versions", "--store", uri, "--last", "1")
    assert [one["version"] for one in few] == [newest, pinned]
    assert main(["store", "versions", "--store", uri]) == 0
    assert "vacuumed" in capsys.readouterr().out
    assert main(["store", "status", "--store", uri, "--version", str(newest + 5)]) == 1
    told = capsys.readouterr().err
    assert f"no version {newest + 5}; there are 0 to {newest}, and" in told
    assert "Kernel" not in told


def test_a_version_is_pinned_by_hand_until_it_is_unpinned(
    vacuumed: tuple[str, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    uri, (gone, pinned, _, young, newest) = vacuumed

    def pin(version: int, name: str) -> list[str]:
        return ["store", "pin", "--store", uri, "--version", str(version), "--pin", name]

    assert main(pin(young, "paper")) == 0
    assert FeatureStore.open(uri).pins() == {"paper": young, "run-1": pinned}
    for version, name, said in (
        (newest, "paper", f"pin 'paper' keeps version {young}"),
        (newest, "a/b", "pin 'a/b'; a name has"),
        (gone, "old", f"version {gone} was vacuumed"),
        (99, "old", "no version 99"),
    ):
        assert main(pin(version, name)) == 1
        assert said in capsys.readouterr().err
    capsys.readouterr()
    assert main(["store", "status", "--store", uri]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert f"    paper  version {young}" in shown
    assert f"    run-1  version {pinned}" in shown
    assert main(["store", "unpin", "--store", uri, "--pin", "paper"]) == 0
    assert FeatureStore.open(uri).pins() == {"run-1": pinned}


def test_pins_of_runs_that_are_gone_are_let_go_of_and_no_others(
    source: CheapSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FeatureStore.open(source.store)
    runs = tmp_path / "runs"
    for name in ("live", "cleared", "removed"):
        (runs / name).mkdir(parents=True)
        store.pin(1, name, str(runs / name))
    (runs / "live" / "run.json").write_text("{}")
    (runs / "removed").rmdir()
    (tmp_path / "mount").mkdir()
    store.pin(1, "unmounted", str(tmp_path / "mount" / "run"))
    store.pin(1, "by-hand")
    store.pin(1, "elsewhere", str(runs / "elsewhere"))
    about = Path(source.store, "pins", "elsewhere.json")
    about.write_text(json.dumps(json.loads(about.read_text()) | {"machine": "another"}))
    unpin = ["unpin", "--store", source.store, "--gone"]
    before = store.pins()
    found = _said(capsys, *unpin, "--dry-run")
    assert store.pins() == before
    assert found == _said(capsys, *unpin)
    assert found["gone"] == ["cleared", "removed"]
    assert set(found["unknown"]) == {"elsewhere", "unmounted"}
    assert set(store.pins()) == {"live", "by-hand", "elsewhere", "unmounted"}
    assert main(["store", *unpin, "--pin", "live"]) == 2
