"""What a command says that it would do, without doing it."""

import json
from pathlib import Path

import pytest
from support.stores import noise_store

from diccae.cli import main
from pipeline.config import FeatureSpec

SPEC = FeatureSpec(n_frames=2, frame_size=32, fbank_frames=32, n_mels=16, duration_s=1.0)


def test_what_would_be_sent_is_listed_and_no_cluster_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("code.py", "x = 1"), ("deep.pem", "key"), ("kept.log", "log"), (".gitignore", "*.log\n"),
        ("mine.txt", "mine"),
    ):  # fmt: skip
        Path(name).write_text(content)
    submit = ["submit", "--dry-run", "--exclude", "mine.txt", "--"]
    command = ["report", "--out", "s3://bucket/run"]
    assert main([*submit, *command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "send      code.py  5 bytes" in lines
    assert [line.split()[2] for line in lines if line.startswith("leave out")] == [
        "deep.pem", "kept.log", "mine.txt",
    ]  # fmt: skip
    assert "leave out mine.txt  excluded" in lines
    assert any("2 files, 11 bytes before compression, of .; 3 files and" in line for line in lines)
    assert lines[-1] == "command   diccae report --out s3://bucket/run"
    assert main([*submit, "pretrain", "--store", "s", "--out", "s3://bucket/run"]) == 2
    assert "--store s: a folder of the job's own copy" in capsys.readouterr().err


def test_the_cost_of_a_run_is_told_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = noise_store(tmp_path / "store", SPEC, 16)
    small = ["--encoder.dim", "16", "--encoder.projection", "8", "--data.lanes", "1"]
    small += ["--pretrain.batch-size", "4", "--data.frames-per-clip", "1"]
    small += ["--rounds.labels", "none", "--pretrain.epochs", "2"]
    typed = ["pretrain", "--store", store.uri, "--out", str(tmp_path / "run"), *small]
    assert main([*typed, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([*typed, "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line[:18].strip() for line in shown] == list(found)
    assert not (tmp_path / "run").exists()
