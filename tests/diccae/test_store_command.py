"""`diccae store` as it is typed: what an action takes, and that it does that."""

import json
import re
import shlex
from pathlib import Path

import pytest
from support.cheap_source import CHEAP_SPECS, CheapSource

from diccae.cli import main

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
