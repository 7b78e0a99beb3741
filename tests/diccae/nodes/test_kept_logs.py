"""Logs of a run's processes below its folder: bounded, without secrets, written by one attempt."""

import re
from pathlib import Path

import pytest

from diccae.cli import main
from diccae.nodes.kept_logs import KeptLogs
from diccae.nodes.log_files import (
    HEAD_BYTES,
    TAIL_BYTES,
    LogFile,
    Masks,
    files_of,
    what_is_kept,
)
from diccae.nodes.watch import Keeper, masks
from diccae.run_folder import RunFolder
from pipeline.storage import Location
from pipeline.store.lease import Lease
from training.attempt import Attempt
from training.errors import RunTaken

WORKER = "02034c7c64fe60aacee81d074f9cd328dc0607dc75a5752a8535db6a"


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_only_the_files_of_the_job_are_kept(tmp_path: Path) -> None:
    ours = _write(tmp_path / f"worker-{WORKER}-02000000-77.out", ":job_id:02000000\nhello\n")
    _write(tmp_path / f"worker-{WORKER[::-1]}-01000000-78.out", "another job\n")
    _write(tmp_path / f"worker-{WORKER[1:]}f-02000000-79.err", "the watch itself\n")
    _write(tmp_path / "raylet.out", "Ray's own\n")
    train = _write(tmp_path / "train" / f"ray-train-app-worker-{WORKER}.log", "step 1\n")
    _write(tmp_path / "train" / f"ray-train-app-worker-{WORKER[::-1]}.log", "another job\n")
    found = {file.name: file.path for file in files_of(tmp_path, "02000000", but_pid=79)}
    assert found == {
        "process-77-02034c7c.out": ours,
        "train-app-worker-02034c7c.log": train,
    }
    assert what_is_kept(ours) == b"hello\n"


def test_a_log_of_any_length_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    lines = [f"line {i:07d}" for i in range(200_000)]
    path = _write(tmp_path / "log", "\n".join(lines) + "\n")
    kept = what_is_kept(path).decode()
    assert len(kept) < HEAD_BYTES + TAIL_BYTES + 100
    assert kept.startswith(lines[0])
    assert kept.endswith(lines[-1] + "\n")
    left_out = len(lines) * 13 - HEAD_BYTES - TAIL_BYTES
    assert f"\n... {left_out:,} bytes are left out ...\n" in kept


def test_no_secret_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret, token = "hunter2hunter2", "9f" * 32
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("DICCAE_COLOUR", "green-and-blue")
    said = f"key {secret} at s3, Authorization: Bearer abc.def, token={token}, green-and-blue, "
    said += "postgresql://mlflow:open-sesame@db:5432/mlflow http://10.0.0.1:8265/x\n"
    with RunFolder(tmp_path / "run").held("pretrain"):
        pass
    folder = RunFolder(tmp_path / "run")
    with folder.held("pretrain"):
        logs = KeptLogs(folder.attempt, "10.0.0.7", masks())
        logs.publish([LogFile("driver.log", _write(tmp_path / "log", said))])
    [path] = (tmp_path / "run" / "logs" / "attempt-2").iterdir()
    assert path.read_text() == (
        "# 10.0.0.7: log\nkey *** at s3, Authorization: Bearer ***, token=***, green-and-blue, "
        "postgresql://mlflow:***@db:5432/mlflow http://10.0.0.1:8265/x\n"
    )


def test_a_secret_that_is_part_of_another_leaves_nothing_of_it() -> None:
    names = re.compile("TOKEN")
    found = Masks.of({"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-ijkl"}, names, "")
    assert found.over(b"<abcdefgh-ijkl> <abcdefgh>") == b"<***> <***>"


def test_a_file_is_written_again_only_when_it_grew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    source = _write(tmp_path / "log", "one\n")
    with folder.held("pretrain"):
        logs = KeptLogs(folder.attempt, "node", Masks([]))
        kept = tmp_path / "run" / "logs" / "attempt-1" / "driver.log"
        logs.publish([LogFile("driver.log", source)])
        before = kept.stat().st_mtime_ns
        logs.publish([LogFile("driver.log", source)])
        assert kept.stat().st_mtime_ns == before
        with open(source, "a") as file:
            file.write("two\n")
        logs.publish([LogFile("driver.log", source)])
        assert kept.read_text().splitlines()[1:] == ["one", "two"]


def test_an_attempt_that_lost_its_run_keeps_nothing_more(tmp_path: Path) -> None:
    lost, source = RunFolder(tmp_path / "run"), _write(tmp_path / "log", "one\n")
    with lost.held("pretrain"):
        attempt = lost.attempt
    with RunFolder(tmp_path / "run").held("pretrain"):
        logs = KeptLogs(attempt, "node", Masks([]))
        with pytest.raises(RunTaken):
            logs.publish([LogFile("driver.log", source)])
        keeper = Keeper(logs, lambda: [LogFile("driver.log", source)], None, every_s=600)
        keeper.close()
    assert not (tmp_path / "run" / "logs").exists()


def test_logs_are_kept_in_an_object_store_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = LogFile("driver.log", _write(tmp_path / "log", "one\n"))
    with Lease(Location("memory://runs/one"), 60.0, "a run") as lease:
        attempt = Attempt("memory://runs/one", lease.generation)
        KeptLogs(attempt, "10.0.0.7", Masks([])).publish([source])
    assert main(["logs", "--out", "memory://runs/one"]) == 0
    assert capsys.readouterr().out == "# 10.0.0.7: log\none\n"


def test_kept_logs_are_read_by_attempt_and_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["logs", "--out", str(run)]) == 2
    assert "nothing was kept" in capsys.readouterr().err
    for attempt, name in ((1, "driver.log"), (10, "driver.log"), (10, "process-7-aa.err")):
        _write(run / "logs" / f"attempt-{attempt}" / name, f"{name} of {attempt}\n")
    assert main(["logs", "--out", str(run)]) == 0
    said = capsys.readouterr()
    assert said.out == "driver.log of 10\n"
    assert "process-7-aa.err" in said.err
    assert main(["logs", "--out", str(run), "--of", "all"]) == 0
    assert capsys.readouterr().out == "driver.log of 10\nprocess-7-aa.err of 10\n"
    assert main(["logs", "--out", str(run), "--attempt", "1"]) == 0
    assert capsys.readouterr().out == "driver.log of 1\n"
    assert main(["logs", "--out", str(run), "--attempt", "3"]) == 2
    assert "there are those of 1, 10" in capsys.readouterr().err
    assert main(["logs", "--out", str(run), "--of", "nobody"]) == 2
    assert "it kept driver.log, process-7-aa.err" in capsys.readouterr().err
    assert main(["logs"]) == 2


def test_the_last_lines_of_kept_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("driver.log", "process-7-aa.err"):
        _write(tmp_path / "logs" / "attempt-1" / name, f"first\nsecond\nlast of {name}\n")
    logs = ["logs", "--out", str(tmp_path), "--of", "all", "--tail"]
    assert main([*logs, "1"]) == 0
    assert capsys.readouterr().out == "last of driver.log\nlast of process-7-aa.err\n"
    assert main([*logs, "9"]) == 0
    assert capsys.readouterr().out.count("\n") == 6
    assert main([*logs, "0"]) == 2
    assert "--tail 0: 1 or more are allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--out", "run", "--follow"], "--follow goes with a job, not with --out"),
        (["--out", "run", "--address", "x"], "--address goes with a job, not with --out"),
        (["job", "--attempt", "2"], "--attempt goes with --out, not with a job"),
        (["job", "--of", "all"], "--of goes with --out, not with a job"),
        (["job", "--follow", "--tail", "3"], "--tail 3: goes without --follow"),
        ([], "name a job (diccae jobs lists them), or a run with --out"),
    ],
)
def test_an_option_of_logs_that_would_not_be_looked_at_is_refused(
    typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", *typed]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"diccae logs: {said}")
    assert told.count("\n") == 1
