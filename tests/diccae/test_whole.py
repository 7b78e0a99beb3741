"""The main job: ingest, pretraining killed and taken up again, fine-tuning, evaluation, report."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from support.processes import ray_env
from support.runs import CONFIGS, N_TEST, N_TRAIN, SMOKE, lines

from diccae.cli import main

BASELINE = str(CONFIGS / "cavmae-smoke.yaml")
Diccae = Callable[..., str]
EPOCHS = 4
N_STEPS = EPOCHS * N_TRAIN // 32


def _baseline(place: Path) -> str:
    """CAV-MAE's config without its features: the store has the mean of the channels."""
    content = yaml.safe_load(Path(BASELINE).read_text())
    del content["features"]
    (place / "baseline.yaml").write_text(yaml.safe_dump(content))
    return str(place / "baseline.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def test_an_ingest_is_a_run_in_mlflow_and_one_with_nothing_to_do_is_none(store: str) -> None:
    from mlflow.tracking import MlflowClient

    place = Path(store).parent
    uri = f"sqlite:///{place}/mlflow.db"
    source = ["--clips", f"{place}/clips/clips.csv", "--videos", f"{place}/clips/videos"]
    assert main(["ingest", *source, "--store", store, "--tracking.uri", uri]) == 0
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("diccae").experiment_id
    [run] = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert run.data.params["features.frame_size"] == "64"
    assert run.data.tags["store.uri"] == store
    n_clips = N_TRAIN + N_TEST
    assert (run.data.metrics["ok"], run.data.metrics["new"]) == (n_clips, n_clips)
    assert run.data.metrics["version"] >= 1
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "committed")]
    assert steps[-1] == n_clips


def _kill_after_checkpoint(arguments: list[str], place: Path, out: Path) -> None:
    """SIGKILL a driver on this test's cluster once a checkpoint is on storage and steps go on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "diccae", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=place,
        env=ray_env(),
    )
    deadline = time.monotonic() + 400
    while not any((out / "pretrain").glob("checkpoint_*/state.pt")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.1)
    process.kill()
    process.wait()


def test_killed_pretraining_goes_on_and_the_run_is_finished(
    place: Path, store: str, diccae: Diccae, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    out = place / "run"
    arguments = ["pretrain", "--config", SMOKE, "--store", os.path.relpath(store, place)]
    arguments += ["--out", "run", "--pretrain.log-every", "1", "--pretrain.epochs", str(EPOCHS)]
    _kill_after_checkpoint(arguments, place, out)
    killed_at = int(lines(out / "metrics.jsonl")[-1]["step"])
    diccae(*arguments)
    steps = [int(line["step"]) for line in lines(out / "metrics.jsonl")]
    assert steps == list(range(1, N_STEPS + 1)), f"killed at {killed_at}"
    assert any("clustering/nmi" in line for line in lines(out / "metrics.jsonl"))

    diccae("finetune", "--out", "run")
    diccae("evaluate", "--out", "run")
    _check_vectors(diccae, store, out)
    page = Path(diccae("report", "--out", "run").strip())
    assert page.stat().st_size > 50_000
    _check_results(json.loads((out / "results.json").read_text()))
    _check_mlflow(out)


def _check_vectors(diccae: Diccae, store: str, out: Path) -> None:
    """`embed` writes the embeddings that `evaluate` kept, each of length 1."""
    arguments = ["--store", store, "--encoder", str(out / "encoder"), "--config", SMOKE]
    diccae("embed", *arguments, "--split", "test", "--out", "vectors.parquet")
    table = pq.read_table("vectors.parquet")
    kept = np.load(out / "evaluation" / "embeddings.npz")
    assert table["id"].to_pylist() == kept["clip_ids"].tolist()
    for stream in ("audio", "video", "fusion"):
        unit = kept[stream] / np.linalg.norm(kept[stream], axis=1, keepdims=True)
        np.testing.assert_allclose(np.stack(table[stream].to_numpy()), unit, atol=1e-5)


def _check_results(results: dict[str, Any]) -> None:
    for name in ("top1", "top5", "probe", "knn"):
        both = {"audio_video"} if name in ("probe", "knn") else set()
        assert set(results[name]) == {"audio", "video", "fusion"} | both
        assert all(0 <= value <= 1 for value in results[name].values())
    assert (results["n_train"], results["n_test"]) == (N_TRAIN, N_TEST)
    assert results["pseudo_labels"]["k"] == 8
    assert results["store"]["version"] >= 0
    assert set(results["seconds"]) >= {"pretrain", "cluster", "finetune", "evaluate"}


def _check_mlflow(out: Path) -> None:
    from mlflow.tracking import MlflowClient

    record = json.loads((out / "run.json").read_text())
    client = MlflowClient(record["mlflow"]["uri"])
    run = client.get_run(record["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["clustering.k"] == "8"
    history = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(history) == list(range(1, N_STEPS + 1)), "gaps or doubles"


def test_another_config_in_the_same_folder_is_refused_by_key(
    place: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "run"
    assert (out / "run.json").exists()
    baseline = _baseline(place)
    assert main(["pretrain", "--config", baseline, "--store", store, "--out", str(out)]) == 2
    assert "loss.reconstruction: 0.0 -> 1.0" in capsys.readouterr().err


def test_a_store_that_is_another_one_by_now_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    record = json.loads(Path("run/run.json").read_text())
    record["store"]["digest"] = "0" * 64
    Path("copy").mkdir()
    Path("copy/run.json").write_text(json.dumps(record))
    Path("copy/config.yaml").write_text(Path("run/config.yaml").read_text())
    for command in ("finetune", "evaluate"):
        assert main([command, "--out", "copy"]) == 2
        assert "holds other clips than this run read" in capsys.readouterr().err


def test_baseline_recipe_runs_and_dry_run_says_what_it_costs(
    place: Path, store: str, diccae: Diccae
) -> None:
    out = place / "baseline"
    arguments = ["pretrain", "--config", _baseline(place), "--store", store, "--out", str(out)]
    dry = diccae(*arguments, "--dry-run")
    for name in ("parameters", "forward per clip", "memory per device", "steps", "estimated time"):
        assert name in dry
    assert not out.exists()
    diccae(*arguments)
    last = lines(out / "metrics.jsonl")[-1]
    assert last["loss_reconstruction"] > 0
    assert "loss_confusion" not in last
    assert not any(name.startswith("clustering/") for name in last)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--clustering.k", "4000"], "clustering.k = 4000"),
        (["--data.frames-per-clip", "9"], "data.frames_per_clip = 9"),
        (["--pretrain.batch-size", "30"], "data.lanes = 4"),
        (["--pretrain.batch-size", "400"], f"only {N_TRAIN} clips"),
        (["--scale.num-workers", "5"], "data.lanes = 4 are too few for 5 workers"),
    ],
)
def test_what_cannot_work_is_said_before_the_cluster_is_used(
    change: list[str],
    said: str,
    place: Path,
    store: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    monkeypatch.setattr("diccae.stages.pretrain.start_ray", lambda: started.append("ray"))
    out = str(place / "bad")
    assert main(["pretrain", "--config", SMOKE, "--store", store, "--out", out, *change]) == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert not started
