"""The main job from the command line: clips to report, killed on the way and taken up again."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "vggsound-smoke.yaml")
BASELINE = str(ROOT / "configs" / "cavmae-smoke.yaml")

Command = Callable[..., list[str]]
Diccae = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def _lines(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _stop_after_checkpoint(command: list[str], out: Path, with_signal: signal.Signals) -> int:
    """Send the driver a signal once a checkpoint is on storage. Returns: its exit code."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=out.parent
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        if any((out / "pretrain").glob("checkpoint_*/state.pt")):
            process.send_signal(with_signal)
            return process.wait(60)
        time.sleep(0.1)
    raise AssertionError("no checkpoint in time")


def test_killed_pretraining_goes_on_and_the_run_is_finished(
    place: Path, store: str, command: Command, diccae: Diccae
) -> None:
    out = place / "run"
    arguments = ["pretrain", "--config", CONFIG, "--store", os.path.relpath(store, place)]
    arguments += ["--out", "run", "--pretrain.log-every", "1", "--pretrain.epochs", "6"]
    assert _stop_after_checkpoint(command(*arguments), out, signal.SIGKILL) == -signal.SIGKILL
    killed_at = int(_lines(out / "metrics.jsonl")[-1]["step"])
    resumed = diccae(*arguments, cwd=place)
    assert "going on with the run" in resumed.stderr
    steps = [int(line["step"]) for line in _lines(out / "metrics.jsonl")]
    assert steps == list(range(1, 31)), f"killed at {killed_at}"
    assert any("clustering/nmi" in line for line in _lines(out / "metrics.jsonl"))

    diccae("finetune", "--out", "run", cwd=place)
    diccae("evaluate", "--out", "run", cwd=place)
    page = Path(diccae("report", "--out", "run", cwd=place).stdout.strip())
    assert page.stat().st_size > 50_000
    results = json.loads((out / "results.json").read_text())
    for name in ("top1", "top5", "probe"):
        assert set(results[name]) == {"audio", "video", "fusion"}
        assert all(0 <= value <= 1 for value in results[name].values())
    assert (results["n_train"], results["n_test"]) == (160, 48)
    assert results["pseudo_labels"]["k"] == 8
    assert results["store"]["version"] >= 0
    assert set(results["seconds"]) >= {"pretrain", "cluster", "finetune", "evaluate"}
    _check_mlflow(out)


def _check_mlflow(out: Path) -> None:
    from mlflow.tracking import MlflowClient

    record = json.loads((out / "run.json").read_text())
    client = MlflowClient(record["mlflow"]["uri"])
    run = client.get_run(record["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["clustering.k"] == "8"
    history = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(history) == list(range(1, 31)), "gaps or doubles"


def test_another_config_in_the_same_folder_is_refused_by_key(
    place: Path, store: str, command: Command
) -> None:
    out = place / "run"
    assert out.exists()
    done = subprocess.run(
        command("pretrain", "--config", BASELINE, "--store", store, "--out", str(out)),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "loss.reconstruction: 0.0 -> 1.0" in done.stderr


def test_baseline_recipe_is_interrupted_and_goes_on(
    place: Path, store: str, command: Command, diccae: Diccae
) -> None:
    out = place / "baseline"
    arguments = ["pretrain", "--config", BASELINE, "--store", store, "--out", str(out)]
    dry = diccae(*arguments, "--dry-run").stdout
    for name in ("parameters", "forward per clip", "memory per device", "steps", "estimated time"):
        assert name in dry
    assert not out.exists()
    assert _stop_after_checkpoint(command(*arguments), out, signal.SIGINT) == 130
    diccae(*arguments)
    last = _lines(out / "metrics.jsonl")[-1]
    assert last["loss_reconstruction"] > 0
    assert "loss_confusion" not in last
    assert not any(name.startswith("clustering/") for name in last)


def test_workers_that_die_are_replaced_and_nothing_changes(
    place: Path, store: str, command: Command, diccae: Diccae
) -> None:
    """Three workers on four lanes: shares of unequal size, and one worker lost on the way."""
    arguments = ["pretrain", "--config", CONFIG, "--store", store, "--pretrain.log-every", "1"]
    arguments += ["--scale.num-workers", "3", "--scale.cpus-per-worker", "0.2"]
    arguments += ["--scale.reader-cpus", "0.1", "--scale.threads-per-worker", "1"]
    diccae(*arguments, "--out", str(place / "undisturbed"))

    out = place / "disturbed"
    process = subprocess.Popen(
        command(*arguments, "--out", str(out)), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not any((out / "pretrain").glob("checkpoint_*/state.pt")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.05)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in child.name() or "RayTrainWorker" in " ".join(child.cmdline())
    ]
    assert len(workers) == 3
    workers[1].kill()
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    weights = [
        (place / name / "encoder" / "encoder.safetensors").read_bytes()
        for name in ("undisturbed", "disturbed")
    ]
    assert weights[0] == weights[1]
    steps = [int(line["step"]) for line in _lines(out / "metrics.jsonl")]
    assert steps == list(range(1, 16))


def test_what_cannot_work_is_said_before_the_cluster_is_used(
    place: Path, store: str, command: Command
) -> None:
    arguments = ["pretrain", "--config", CONFIG, "--store", store, "--out", str(place / "bad")]
    for change, said in (
        (["--clustering.k", "4000"], "clustering.k = 4000"),
        (["--data.frames-per-clip", "9"], "data.frames_per_clip = 9"),
        (["--pretrain.batch-size", "30"], "data.lanes = 4"),
        (["--pretrain.batch-size", "400"], "only 160 clips"),
    ):
        done = subprocess.run(
            command(*arguments, *change),
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        )
        assert done.returncode == 1, done.stderr
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
