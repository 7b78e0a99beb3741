"""Two starts of one command on one run folder, as real processes: one writes, the other learns."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.polling import wait_until
from support.runs import SMOKE, lines

from diccae.cli import main
from diccae.run_folder import RunFolder
from pipeline.errors import StoreLocked
from pipeline.storage import Location
from training.attempt import Attempt
from training.cluster_config import TrackingConfig
from training.errors import RunTaken
from training.tracking.client import mlflow_client
from training.tracking.copier import MetricsCopier
from training.tracking.mlflow_run import create_run
from training.tracking.tracker import METRICS, Tracker

STALE_S = "2"
HOLDER = """
import sys, time
from diccae.run_folder import RunFolder
from pipeline.errors import StoreLocked
from training.errors import RunTaken
from training.tracking import spool
from training.tracking.tracker import METRICS, Tracker

spool.PUBLISH_S = 0.05
folder = RunFolder(sys.argv[1])
refused = []
with folder.held("pretrain", 1.5):
    attempt = folder.attempt
    tracker = Tracker(folder.place.uri_of("metrics.jsonl"), attempt=attempt)
    folder.write_record(begun=True)
    print("holds", attempt.number, flush=True)
    for step in range(1, 100_000):
        try:
            tracker.log(step, {"loss": 1.0})
        except RunTaken as error:
            refused.append("metric")
            break
        time.sleep(0.005)
    for name, write in {
        "record": lambda: folder.write_record(late=True),
        "results": lambda: folder.write_results(late=True),
        "tracker": lambda: Tracker(folder.place.uri_of("x.jsonl"), attempt=attempt),
    }.items():
        try:
            write()
        except (StoreLocked, RunTaken):
            refused.append(name)
print("refused", *refused, flush=True)
"""


def _digests(folder: Path) -> dict[str, str]:
    """Of all files but the lease, whose owner is none of theirs."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.parent != folder / "lease"
    }


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds `run` and writes a metric every 5 ms."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds 1\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_start_is_refused_while_the_first_lives_and_goes_on_once_it_is_dead(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    said = rf"locked by diccae pretrain \(host .*process {holder.pid}, since 20.*heartbeat"
    with pytest.raises(StoreLocked, match=said) as caught, folder.held("pretrain"):
        pass
    assert caught.value.exit_code == 4
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with folder.held("pretrain"):
        assert time.monotonic() - began < 1
        assert folder.attempt == Attempt(str(tmp_path / "run"), 2)
        folder.write_record(begun=True)
    assert folder.record["attempt"] == 2


def test_a_start_that_was_taken_for_dead_writes_nothing_any_more(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    out = tmp_path / "run"
    folder = RunFolder(out)
    wait_until(lambda: bool(lines(out / "metrics.jsonl")), 200, "a metric")
    holder.send_signal(signal.SIGSTOP)

    def taken() -> bool:
        try:
            with folder.held("pretrain", 1.5):
                before = _digests(out)
                holder.send_signal(signal.SIGCONT)
                assert holder.stdout is not None
                assert holder.stdout.readline() == "refused metric record results tracker\n"
                assert _digests(out) == before
                return True
        except StoreLocked:
            return False

    wait_until(taken, 60, "the stopped start was taken for dead")


def test_a_second_attempt_runs_in_mlflow_although_the_first_left_no_checkpoint(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "run")
    handle = create_run(TrackingConfig(), folder.uri, {}, {}, {})
    client, path = mlflow_client(handle.uri), folder.place.uri_of(METRICS)
    client.set_terminated(handle.run_id, "FAILED")
    for copied_by_a_report in (True, False):
        if copied_by_a_report:
            assert MetricsCopier(handle, folder.place, METRICS).drain(60)
        else:
            with folder.held("pretrain"):
                tracker = Tracker(path, attempt=folder.attempt)
                tracker.log(1, {"loss": 1.0})
                tracker.close()
                assert MetricsCopier(handle, folder.place, METRICS, folder.attempt).drain(60)
        status = client.get_run(handle.run_id).info.status
        assert status == ("FAILED" if copied_by_a_report else "RUNNING")


def test_a_fresh_start_does_not_give_the_folder_back_to_the_one_before(tmp_path: Path) -> None:
    """--fresh deletes the run, and not what says whose turn it is."""
    folder = RunFolder(tmp_path / "run")
    with folder.held("pretrain"):
        first = folder.attempt
        folder.write_record(begun=True)
    with folder.held("pretrain"):
        folder._clear()
        with pytest.raises(RunTaken, match="lost its lease"):
            first.check()
    assert not folder.record


def test_in_a_bucket_a_start_that_was_taken_for_dead_writes_nothing_either(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(f"{bucket}/run")
    command = [sys.executable, "-c", HOLDER, folder.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds 1\n"
        wait_until(lambda: folder.place.exists("metrics.jsonl"), 200, "metrics")
        holder.send_signal(signal.SIGSTOP)
        wait_until(lambda: _taken_from(folder, holder), 60, "taken over")
    assert not list(tmp_path.iterdir())


def _taken_from(folder: RunFolder, holder: "subprocess.Popen[str]") -> bool:
    try:
        with folder.held("pretrain", 1.5):
            before = _objects(folder.place)
            holder.send_signal(signal.SIGCONT)
            assert holder.stdout is not None
            assert holder.stdout.readline() == "refused metric record results tracker\n"
            assert _objects(folder.place) == before
            return True
    except StoreLocked:
        return False


def _objects(place: Location) -> dict[str, str]:
    """Digests of all but the lease's."""
    found = place.fs.find(place.path, detail=True)
    return {name: about["ETag"] for name, about in found.items() if "/lease/" not in name}


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "--store", "s"],
        ["finetune"],
        ["evaluate"],
        ["report"],
        ["ablate", "--store", "s"],
        ["weights", "import", "--model", "m", "--store", "s"],
    ],
    ids=" ".join,
)
def test_half_a_uri_is_no_run_folder(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """It was the folder `./s3:/bucket/run` of the driver's node."""
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--out", "s3:/bucket/run"]) == 1
    assert "did you mean s3://bucket/run?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_stopped_pretraining_is_taken_over_and_writes_nothing_more(
    ray_session: None, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first has a Ray of its own, whose workers train on while their driver is stopped."""
    out = tmp_path / "run"
    command = ["pretrain", "--store", store, "--out", str(out), "--config", SMOKE]
    command += ["--pretrain.epochs", "60", "--pretrain.checkpoint-every", "10"]
    command += ["--scale.lease-stale-s", STALE_S]
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    first = subprocess.Popen([sys.executable, "-m", "diccae", *command], env=env)
    try:
        checkpoints = out / "pretrain"
        wait_until(lambda: any(checkpoints.glob("checkpoint_*/state.pt")), 200, "a checkpoint")
        assert main(command) == 4
        assert "locked by diccae pretrain" in capsys.readouterr().err
        first.send_signal(signal.SIGSTOP)
        codes: list[int] = []
        wait_until(lambda: codes.append(main(command)) or codes[-1] != 4, 200, "taken over")
        assert codes[-1] == 0
        before = _digests(out)
        first.send_signal(signal.SIGCONT)
        assert first.wait(100) == 4
        assert _digests(out) == before
    finally:
        first.kill()
    metrics = lines(out / "metrics.jsonl")
    steps = [line["step"] for line in metrics]
    assert steps == sorted(set(steps))
    assert [line["attempt"] for line in metrics] == sorted(line["attempt"] for line in metrics)
    assert {line["attempt"] for line in metrics} == {1.0, 2.0}
    assert json.loads((out / "run.json").read_text())["attempt"] == 2
