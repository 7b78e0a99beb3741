"""The `diccae` command: help without waiting, errors in one line, exit codes."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.stores import noise_store

from diccae.cli import main
from diccae.run_folder import log_to_screen
from diccae.subcommands import COMMANDS
from pipeline.config import FeatureSpec

_HEAVY = ("torch", "ray", "mlflow", "faiss", "deltalake", "pyarrow", "matplotlib", "sklearn", "av")


def test_help_imports_nothing_heavy() -> None:
    """One after the other in one process: what a command imports stays."""
    code = (
        "import sys; from diccae.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    arguments = [command, '--help'] if command else ['--help']\n"
        "    try: main(arguments)\n"
        "    except SystemExit as stopped: assert stopped.code == 0, (command, stopped.code)\n"
        f"    heavy = [m for m in {_HEAVY} if m in sys.modules]\n"
        "    assert not heavy, (command, heavy)\n"
        "    print(end='\\0')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "", *COMMANDS], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    for shown in done.stdout.split("\0")[:-1]:
        assert "usage" in shown.lower()


def test_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "Did you mean pretrain?" in capsys.readouterr().err


def test_own_error_is_one_line_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    assert main(["store", "status", "--store", f"{tmp_path}/nothing"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "nothing" in err


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("/dev/null/store", "NotADirectoryError: [Errno 20] Not a directory"),
        ("s3://bucket/store", "EndpointConnectionError: Could not connect"),
        ("nowhere://bucket/store", "nowhere://bucket/store: Protocol not known"),
    ],
)
def test_storage_that_cannot_be_used_is_one_line(
    store: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("pipeline.patience.ATTEMPTS", 1)  # It would be tried for a minute.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    (tmp_path / "clips.csv").write_text("a,1,dog,train\n")
    (tmp_path / "a_000001.mp4").touch()
    source = ["--clips", str(tmp_path / "clips.csv"), "--videos", str(tmp_path)]
    assert main(["ingest", *source, "--store", store]) == 1
    *before, line = capsys.readouterr().err.splitlines()
    assert said in line
    assert all("waiting for storage" in told for told in before)


def test_a_warning_is_told_once_wherever_stderr_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    """Each command of one process added a handler of its own, to the stderr of its time."""
    log_to_screen()
    log_to_screen()
    logging.getLogger("pipeline.anything").warning("hm")
    assert capsys.readouterr().err == "WARNING pipeline.anything: hm\n"


def test_a_number_that_cannot_be_is_one_line_and_removes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = noise_store(tmp_path / "store", FeatureSpec(n_frames=1, frame_size=16), 4).uri
    stray = tmp_path / "store" / "features" / "part-run-000009-0.parquet"
    stray.touch()
    for action, option, value, said in (
        ("vacuum", "--retention-hours", "-5", "a retention of -5 hours; allowed are 0 to"),
        ("vacuum", "--retention-hours", "nan", "a retention of nan hours; allowed are 0 to"),
        ("status", "--version", "-1", "no version -1; there are 0 to 1, and"),
        ("export", "--out", str(stray), "a file; name a new folder"),
    ):
        assert main(["store", action, "--store", store, option, value]) in (1, 2)
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.count("\n") == 1
    assert stray.exists(), "the shard of a run under way"


def test_shards_of_a_killed_ingest_are_listed_and_then_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = noise_store(tmp_path / "store", FeatureSpec(n_frames=1, frame_size=16), 4)
    left, young = (store.location.join("features", f"part-{n}-000000-0.parquet") for n in "xy")
    for path in (left, young):  # Written, and not committed.
        Path(path).write_bytes(bytes(1000))
    long_ago = time.time() - 8 * 24 * 3600
    os.utime(left, (long_ago, long_ago))
    before = store.snapshot()
    vacuum = ["store", "vacuum", "--store", store.uri]
    with store.lease(60.0, "an ingest that goes on"):
        assert main(vacuum) == 4
    assert main([*vacuum, "--dry-run"]) == 0
    assert "features/part-x-000000-0.parquet  1,000 bytes\n" in capsys.readouterr().out
    assert Path(left).exists()
    assert main([*vacuum, "--json"]) == 0
    removed = json.loads(capsys.readouterr().out)
    assert (removed["shards"], removed["bytes"]) == (1, 1000)
    assert not Path(left).exists()
    assert Path(young).exists()
    assert store.snapshot().digest == before.digest


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> int:
        raise KeyError("ours")

    monkeypatch.setattr("diccae.commands.store.main", broken)
    with pytest.raises(KeyError):
        main(["store"])
