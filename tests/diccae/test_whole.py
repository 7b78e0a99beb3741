"""The main job from the command line: clips to report, killed on the way and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "vggsound-smoke.yaml")
BASELINE = str(ROOT / "configs" / "cavmae-smoke.yaml")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "diccae", *arguments]


def _diccae(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{arguments}: {done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def store(place: Path) -> str:
    clips = place / "clips"
    _diccae("synth", "--out", str(clips), "--train", "160", "--test", "48")
    uri = str(place / "store")
    source = ["--clips", str(clips / "clips.csv"), "--videos", str(clips / "videos")]
    first = _diccae("ingest", *source, "--store", uri, "--config", CONFIG, "--json")
    summary = json.loads(first.stdout)
    assert (summary["new"], summary["ok"], summary["failed"]) == (208, 208, 0)
    again = _diccae("ingest", *source, "--store", uri, "--config", CONFIG, "--json")
    assert json.loads(again.stdout)["unchanged"] == 208
    return uri


def _lines(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _kill_after_checkpoint(command: list[str], out: Path) -> int:
    """SIGKILL the driver once a checkpoint is on storage and steps go on. Returns: its step."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        if any((out / "pretrain").glob("checkpoint_*/state.pt")):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return int(_lines(out / "metrics.jsonl")[-1]["step"])
        time.sleep(0.1)
    raise AssertionError("no checkpoint in time")


def test_killed_pretraining_goes_on_and_the_run_is_finished(place: Path, store: str) -> None:
    out = place / "run"
    arguments = ["pretrain", "--config", CONFIG, "--store", store, "--out", str(out)]
    arguments += ["--pretrain.log-every", "1", "--pretrain.epochs", "6"]
    killed_at = _kill_after_checkpoint(_command(*arguments), out)
    resumed = _diccae(*arguments)
    assert "going on with the run" in resumed.stderr
    steps = [int(line["step"]) for line in _lines(out / "metrics.jsonl")]
    assert steps == list(range(1, 31)), f"killed at {killed_at}"
    assert any("clustering/nmi" in line for line in _lines(out / "metrics.jsonl"))

    _diccae("finetune", "--out", str(out))
    _diccae("evaluate", "--out", str(out))
    page = Path(_diccae("report", "--out", str(out)).stdout.strip())
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


def test_another_config_in_the_same_folder_is_refused_by_key(place: Path, store: str) -> None:
    out = place / "run"
    assert out.exists()
    done = subprocess.run(
        _command("pretrain", "--config", BASELINE, "--store", store, "--out", str(out)),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "loss.reconstruction: 0.0 -> 1.0" in done.stderr


def test_baseline_recipe_runs_and_dry_run_says_what_it_costs(place: Path, store: str) -> None:
    out = place / "baseline"
    arguments = ["pretrain", "--config", BASELINE, "--store", store, "--out", str(out)]
    dry = _diccae(*arguments, "--dry-run").stdout
    for name in ("parameters", "forward per clip", "memory per device", "steps", "estimated time"):
        assert name in dry
    assert not out.exists()
    _diccae(*arguments)
    last = _lines(out / "metrics.jsonl")[-1]
    assert last["loss_reconstruction"] > 0
    assert "loss_confusion" not in last
    assert not any(name.startswith("clustering/") for name in last)


def test_what_cannot_work_is_said_before_the_cluster_is_used(place: Path, store: str) -> None:
    arguments = ["pretrain", "--config", CONFIG, "--store", store, "--out", str(place / "bad")]
    for change, said in (
        (["--clustering.k", "4000"], "clustering.k = 4000"),
        (["--data.frames-per-clip", "9"], "data.frames_per_clip = 9"),
        (["--pretrain.batch-size", "30"], "data.lanes = 4"),
        (["--pretrain.batch-size", "400"], "only 160 clips"),
    ):
        done = subprocess.run(
            _command(*arguments, *change),
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        )
        assert done.returncode == 1, done.stderr
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
