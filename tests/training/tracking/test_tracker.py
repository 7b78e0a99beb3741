"""A run's two records agree, and no MLflow trouble stops or doubles anything."""

import json
import logging
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from support.mlflow_server import Server
from support.models import saved_models
from support.polling import wait_until

from pipeline.storage import Location
from training.cluster_config import TrackingConfig
from training.predict.registry import register, registered
from training.tracking import client
from training.tracking.client import RunHandle
from training.tracking.copier import MetricsCopier, copied
from training.tracking.mlflow_run import create_run, finish, log_artifacts
from training.tracking.system_metrics import SystemMetrics
from training.tracking.tracker import FINETUNE_METRICS, METRICS, Tracker, read_metrics

STORE = {"uri": "s3://bucket/store", "version": 7, "digest": "ab" * 32}


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _history(handle: RunHandle, key: str) -> list[tuple[int, float]]:
    points = _client(handle.uri).get_metric_history(handle.run_id, key)
    return sorted((point.step, point.value) for point in points)


@pytest.fixture
def out(migrated_db: Path, tmp_path: Path) -> Path:
    shutil.copy(migrated_db, tmp_path / "mlflow.db")
    return tmp_path


def _new_run(out: Path, uri: str | None = None, **tags: str) -> RunHandle:
    params = {"seed": 0, "optim": {"lr": 2e-4, "betas": [0.9, 0.95]}, "empty": {}}
    return create_run(TrackingConfig(uri=uri), str(out), params, tags, STORE)


def test_run_holds_flat_params_tags_and_the_pinned_store(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = out / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    handle = finish(_new_run(out, **{"mlflow.runName": "demo", "config_hash": "c0ffee"}))
    run = _client(handle.uri).get_run(handle.run_id)
    assert run.data.params["optim.lr"] == "0.0002"
    assert run.data.params["optim.betas"] == "[0.9, 0.95]"
    assert run.info.run_name == "demo"
    assert run.info.status == "FINISHED"
    assert run.data.tags["store.digest"] == STORE["digest"]
    (dataset,) = run.inputs.dataset_inputs
    assert json.loads(dataset.dataset.source) == {**STORE, "version": "7"}
    assert handle.uri == f"sqlite:///{out}/mlflow.db"
    assert list(elsewhere.iterdir()) == []  # MLflow's defaults would leave folders here


def test_every_line_reaches_mlflow_once_and_strict_json_holds_nan(out: Path) -> None:
    handle = _new_run(out)
    tracker = Tracker(out / METRICS)
    with copied(handle, Location(out), METRICS):
        for step in range(0, 300, 10):
            odd = {"odd#key": 1, "hit_rate@5": 0.5}
            tracker.log(step, {"loss": 1.0 / (step + 1), "clustering/nmi": float("nan"), **odd})
            wait_until(lambda: bool(_history(handle, "loss")), 60)
        tracker.log(290, {"loss": 99.0})  # a doubled step of the same metric is no second point
        tracker.log(290, {"clustering/churn": 0.25})  # another metric of that step is
    tracker.close()
    finish(handle)
    assert _history(handle, "loss") == [(s, 1.0 / (s + 1)) for s in range(0, 300, 10)]
    assert _history(handle, "clustering/churn") == [(290, 0.25)]
    assert len(_history(handle, "odd_key")) == 30
    assert len(_history(handle, "hit_rate_at_5")) == 30

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (out / METRICS).read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    assert len(parsed) == 31
    assert parsed[0]["clustering/nmi"] is None


def test_resumed_curve_equals_the_uninterrupted_one(out: Path) -> None:
    """Killed at step 57 with a torn line and points MLflow never saw; goes on from step 40."""
    handle = _new_run(out)
    path = out / METRICS
    expected = [(step, float(step)) for step in range(1, 81)]
    with copied(handle, Location(out), METRICS):  # By the driver, which lives on.
        first = Tracker(path)
        for step in range(1, 51):
            first.log(step, {"loss": float(step)})
        wait_until(lambda: len(_history(handle, "loss")) == 50, 60)
        with open(path, "a") as file:
            file.write(json.dumps({"step": 51, "time": 0.0, "loss": 51.0}) + "\n")
            file.write('{"step": 52, "ti')

        second = Tracker(path, resume_step=40)
        for step in range(41, 81):
            second.log(step, {"loss": float(step)})
        second.close()
        wait_until(lambda: _history(handle, "loss") == expected, 60)
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == expected
    assert _history(handle, "resumed_from_step") == [(41, 40.0)]


def test_what_mlflow_missed_before_the_kill_is_sent_on_resume(out: Path) -> None:
    handle = _new_run(out)
    path = out / METRICS
    killed = Tracker(path)
    for step in range(1, 11):
        killed.log(step, {"loss": float(step)})
    killed.close()
    with copied(handle, Location(out), METRICS):
        resumed = Tracker(path, resume_step=10)
        resumed.log(11, {"loss": 11.0})
        wait_until(lambda: len(_history(handle, "loss")) == 11, 60)
    assert _history(handle, "loss") == [(step, float(step)) for step in range(1, 12)]


def test_a_full_disk_costs_the_lines_it_could_not_take(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handle = _new_run(out)
    tracker = Tracker(out / METRICS)
    tracker.log(1, {"loss": 1.0})
    real = tracker._file

    class Full:
        """Takes ten bytes of a line, then none."""

        room = 10

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            self.room = 0
            return real.write(data[:10])

    monkeypatch.setattr(tracker, "_file", Full())
    tracker.log(2, {"loss": 2.0})
    tracker.log(3, {"loss": 3.0})
    monkeypatch.setattr(tracker, "_file", real)
    tracker.log(4, {"loss": 4.0})
    tracker.close()
    finish(handle)
    assert [line["step"] for line in read_metrics(out / METRICS)] == [1, 4]
    assert _history(handle, "loss") == [(1, 1.0), (4, 4.0)]
    assert caplog.text.count("metrics are lost") == 1


WORKER = """
import sys, time
from training.tracking.tracker import Tracker
path, resume = sys.argv[1:]
tracker = Tracker(path, int(resume))
for step in range(int(resume) + 1, 4001):
    tracker.log(step, {"loss": 1.0 / step, "lr": 0.5})
    time.sleep(0.0005)
tracker.close()
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_worker_killed_while_it_logs_leaves_one_whole_curve(out: Path) -> None:
    handle = _new_run(out)
    path = out / METRICS

    def start(resume: int) -> "subprocess.Popen[bytes]":
        args = [sys.executable, "-c", WORKER, str(path), str(resume)]
        return subprocess.Popen(args, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])

    with copied(handle, Location(out), METRICS):
        worker = start(0)
        wait_until(lambda: len(_history(handle, "loss")) > 50, 60)
        worker.kill()
        worker.wait()
        resume = max(line["step"] for line in read_metrics(path)) - 20  # a checkpoint lies behind
        worker = start(resume)
        assert worker.communicate(timeout=400)[0] == b"done\n"
    finish(handle)
    steps = list(range(1, 4001))
    assert [line["step"] for line in read_metrics(path)] == steps
    for key in ("loss", "lr"):
        assert [step for step, _ in _history(handle, key)] == steps


def test_the_end_of_a_run_sends_what_any_stage_left_unsent(out: Path) -> None:
    handle = _new_run(out)
    for name, key in ((METRICS, "loss"), (FINETUNE_METRICS, "finetune/loss")):
        tracker = Tracker(out / name)
        tracker.log(1, {key: 0.5})
        tracker.close()
    finish(handle, "KILLED")
    finish(handle, "FINISHED")
    assert _history(handle, "loss") == _history(handle, "finetune/loss") == [(1, 0.5)]


def test_a_fresh_start_in_an_old_folder_begins_the_file_anew(out: Path) -> None:
    (out / METRICS).write_text('{"step": 0, "time": 0, "loss": 5}\n')
    tracker = Tracker(out / METRICS)
    tracker.log(0, {"loss": 1.0})
    tracker.close()
    assert [line["loss"] for line in read_metrics(out / METRICS)] == [1.0]


def test_a_run_that_mlflow_took_half_is_gone_on_with(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage's start and end left another run behind."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def fails(*_: Any, **__: Any) -> None:
        raise MlflowException("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", fails)
        handle = _new_run(out)
        assert finish(handle).run_id == ""
    handle = finish(handle)
    (run,) = _client(handle.uri).search_runs(["1"])
    assert (run.info.run_id, run.info.status) == (handle.run_id, "FINISHED")
    assert run.data.params["optim.lr"] == "0.0002"


def test_a_server_without_inputs_still_gets_the_run(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def fails(*_: Any, **__: Any) -> None:
        raise MlflowException("no such endpoint")

    monkeypatch.setattr(MlflowClient, "log_inputs", fails)
    handle = _new_run(out)
    assert _client(handle.uri).get_run(handle.run_id).data.tags["store.digest"] == STORE["digest"]
    assert "MLflow could not store what the run reads" in caplog.text


def test_storage_that_fails_is_not_told_as_mlflows_failure(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handle, place = _new_run(out), Location(out)
    Tracker(out / METRICS).log(1, {"loss": 1.0})
    with monkeypatch.context() as patch:

        def away(*_: Any) -> bytes:
            raise ConnectionError("the bucket is away")

        patch.setattr(Location, "read_from", away)
        assert not MetricsCopier(handle, place, METRICS).drain(0)
    said, _ = caplog.messages
    assert said.startswith(f"{place.uri_of(METRICS)}: ConnectionError: the bucket is away")
    assert MetricsCopier(handle, place, METRICS).drain(60)


def test_a_network_that_drops_packets_holds_the_end_for_seconds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request waited 120 s, and each file and setting was sent one after the other."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as deaf:
        deaf.listen(0)
        port = deaf.getsockname()[1]
        handle = RunHandle(f"http://127.0.0.1:{port}", "a-run", str(tmp_path))
        monkeypatch.setattr(client, "_TIMEOUT_S", "1")
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
        for name in (METRICS, FINETUNE_METRICS):
            Tracker(tmp_path / name).log(1, {"loss": 1.0})
        began = time.monotonic()
        finish(handle, timeout_s=0.0)
        assert time.monotonic() - began < 20
    assert f"may lack the end of {tmp_path / METRICS}" in caplog.text
    assert str(tmp_path / FINETUNE_METRICS) not in caplog.text


def test_artifacts_lie_under_their_own_names(out: Path) -> None:
    handle = _new_run(out)
    folder = out / "encoder"
    folder.mkdir()
    (folder / "encoder.safetensors").write_bytes(b"weights")
    (out / "report.html").write_text("<html>")
    assert log_artifacts(handle, [out / "report.html", folder])
    assert {file.path for file in _client(handle.uri).list_artifacts(handle.run_id)} == {
        "encoder",
        "report.html",
    }


def test_a_deleted_run_is_one_warning(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    handle = _new_run(out)
    _client(handle.uri).delete_run(handle.run_id)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(out / METRICS)
        for step in range(20):
            tracker.log(step, {"loss": 1.0})
        tracker.close()
        assert not MetricsCopier(handle, Location(out), METRICS).drain(10)
    assert caplog.text.count("must be in the 'active' state") == 1
    assert len(list(read_metrics(out / METRICS))) == 20


@pytest.mark.slow
def test_a_run_begun_without_mlflow_is_written_when_it_ends(
    mlflow_server: Server, tmp_path: Path
) -> None:
    server = mlflow_server
    server.kill()
    handle = _new_run(tmp_path, server.uri, **{"mlflow.runName": "late"})
    assert handle.run_id == ""
    tracker = Tracker(tmp_path / METRICS)
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    assert finish(handle).run_id == ""  # still away: nothing raises, the record stays
    server.start()
    handle = finish(handle, "FAILED")
    run = _client(server.uri).get_run(handle.run_id)
    assert run.info.run_name == "late"
    assert run.info.status == "FAILED"
    assert run.data.params["optim.lr"] == "0.0002"
    assert _history(handle, "loss") == [(1, 0.5)]


@pytest.mark.slow
def test_server_that_dies_and_comes_back_has_every_point_once(
    mlflow_up: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = mlflow_up
    caplog.set_level(logging.WARNING)
    handle = _new_run(tmp_path, server.uri)
    tracker = Tracker(tmp_path / METRICS)
    tracker.log(1, {"loss": 1.0})
    with copied(handle, Location(tmp_path), METRICS):
        wait_until(lambda: len(_history(handle, "loss")) == 1, 200)
        server.kill()
        for step in range(2, 200):
            tracker.log(step, {"loss": float(step)})
        wait_until(lambda: "training goes on" in caplog.text, 200)
        server.start()
        tracker.log(200, {"loss": 200.0})
        tracker.close()
        wait_until(lambda: len(_history(handle, "loss")) == 200, 200)
    assert _history(handle, "loss") == [(step, float(step)) for step in range(1, 201)]
    assert caplog.text.count("training goes on") == 1
    assert caplog.text.count("answers again") == 1
    assert log_artifacts(handle, [tmp_path / METRICS])
    saved_models(str(tmp_path))
    assert register(handle, tmp_path / "encoder", "over-http") == "1"
    found = _client(server.uri).get_model_version_by_alias("over-http", "candidate")
    assert found.tags["store.uri"] == "s3://b/vgg"


def test_what_a_stage_asks_at_its_end_does_not_grow_with_its_metrics(
    mlflow_up: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked metric by metric, a server far away answered for minutes."""
    asked: list[str] = []
    request = requests.Session.request

    def counted(self: requests.Session, method: str, url: str, **more: Any) -> requests.Response:
        asked.append(url)
        return request(self, method, url, **more)

    monkeypatch.setattr(requests.Session, "request", counted)
    handles = []
    for n_metrics in (1, 30):
        out = tmp_path / str(n_metrics)
        out.mkdir()
        handles.append(_new_run(out, mlflow_up.uri))
        tracker = Tracker(out / METRICS)
        for step in range(1, 4):
            tracker.log(step, {f"metric_{n}": float(n) for n in range(n_metrics)})
        tracker.close()
        assert MetricsCopier(handles[-1], Location(out), METRICS).drain(60)
    counts = []
    for handle in handles:
        asked.clear()
        finish(handle)
        counts.append(len(asked))
    assert counts[0] == counts[1]
    assert _history(handles[1], "metric_29") == [(step, 29.0) for step in (1, 2, 3)]


@pytest.mark.slow
def test_nodes_are_measured_in_one_run_also_after_mlflow_was_away(
    mlflow_up: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = mlflow_up
    caplog.set_level(logging.WARNING)
    handle = _new_run(tmp_path, server.uri)
    nodes = [SystemMetrics(handle, name, every_s=0.1) for name in ("10.0.0.1", "10.0.0.2")]

    def points(node: str) -> int:
        return len(_history(handle, f"system/{node}/cpu_utilization_percentage"))

    def all_measured(more_than: int) -> bool:
        for node in nodes:
            node.keep_on()
        return all(points(name) > more_than for name in ("10.0.0.1", "10.0.0.2"))

    wait_until(lambda: all_measured(0), 200)
    server.kill()
    saved_models(str(tmp_path))
    assert registered(handle, tmp_path / "encoder", "over-http") is None
    assert "MLflow could not register the model" in caplog.text
    told = "gets no metrics of node 10.0.0.1 for now"
    wait_until(lambda: [node.keep_on() for node in nodes] and told in caplog.text, 200)
    nodes[0].keep_on()
    server.start()
    before = max(points("10.0.0.1"), points("10.0.0.2"))
    wait_until(lambda: all_measured(before), 200)
    for node in nodes:
        node.close()
    steps = [step for step, _ in _history(handle, "system/10.0.0.1/cpu_utilization_percentage")]
    assert len(steps) == len(set(steps)), "a point is one"
    assert caplog.text.count(told) == 1
    finish(handle)
    late = SystemMetrics(handle, "10.0.0.3", every_s=0.1)
    late.keep_on()
    late.close()
    assert not [
        name
        for name in _client(handle.uri).get_run(handle.run_id).data.metrics
        if "10.0.0.3" in name
    ], "a run that ended gets no more curves"


def test_a_warning_after_ctrl_c_tells_the_servers_trouble_not_the_interrupt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = TrackingConfig(uri="http://127.0.0.1:1")
    handle = create_run(away, str(tmp_path), {}, {}, STORE)
    caplog.clear()
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        finish(handle, "KILLED")
    assert "Connection refused" in caplog.text
    assert "KeyboardInterrupt" not in caplog.text
