"""`diccae store` as it is typed: what an action takes, and that it does that."""

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
from support.cheap_source import CHEAP_SPECS, CheapSource
from support.stores import noise_store

from diccae.cli import main
from pipeline.config import FeatureSpec
from pipeline.store.schema import CLIPS_SCHEMA

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


def example(clip: dict[str, object]) -> dict[str, object]:
    return {name: clip[name] for name in ("clip_id", "uri", "detail")}


@pytest.mark.parametrize(
    ("action", "option", "actions"),
    [
        ("compact", "--dry-run", "vacuum"),
        ("status", "--split=test", "quality, stats"),
        ("verify", "--version=1", "status, failures, stats, export"),
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
