"""What commands leave in MLflow, and what they say where it is away, against a real server."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.mlflow_server import Server
from support.runs import SMOKE

from diccae.stages.backend import InLab, OnRay

Diccae = Callable[..., str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        server = Server(tmp_path_factory.mktemp("server"))
        yield server
        server.kill()


@pytest.fixture
def running(server: Server) -> Server:
    """The server, as the test before left it or started: its start takes five seconds of CPU."""
    if server.process is None:
        server.start()
    return server


@pytest.fixture
def tracked(in_lab: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages in the lab, with the MLflow run that they have on Ray."""
    monkeypatch.setattr(InLab, "track", OnRay.track)


def _pretrain(store: str, out: Path, *more: str) -> list[str]:
    arguments = ["pretrain", "--config", SMOKE, "--store", store, "--out", str(out)]
    return [*arguments, "--rounds.labels", "none", "--encoder.stem", "conv", "--pretrain.epochs", "1", *more]


@pytest.mark.usefixtures("tracked")
def test_json_of_a_run_in_a_server_is_all_of_stdout(
    running: Server, store: str, tmp_path: Path, diccae: Diccae
) -> None:
    uri = ["--tracking.uri", running.uri]
    printed = diccae(*_pretrain(store, tmp_path / "run", *uri), "--json")
    assert json.loads(printed)["n_train"] > 0
    assert _record(tmp_path / "run")["run_id"], "it is in the server"


def _record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())["mlflow"]
    return found
