"""What commands leave in MLflow, and what they say where it is away, against a real server."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.mlflow_server import Server
from support.runs import SMOKE, lines

from diccae.cli import main
from diccae.stages.backend import InLab, OnRay
from training.run.edge import Written
from training.tracking.client import mlflow_client

Diccae = Callable[..., str]


@pytest.fixture
def tracked(in_lab: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages in the lab, with the MLflow run that they have on Ray."""
    monkeypatch.setattr(InLab, "track", OnRay.track)
    monkeypatch.setattr(InLab, "attach", OnRay.attach)


def _pretrain(store: str, out: Path, *more: str) -> list[str]:
    arguments = ["pretrain", "--config", SMOKE, "--store", store, "--out", str(out)]
    return [
        *arguments,
        "--rounds.labels",
        "none",
        "--encoder.stem",
        "conv",
        "--pretrain.epochs",
        "1",
        *more,
    ]


@pytest.mark.usefixtures("tracked")
def test_a_run_that_mlflow_missed_is_in_it_once_a_report_is_made(
    mlflow_server: Server,
    store: str,
    tmp_path: Path,
    diccae: Diccae,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = mlflow_server
    server.kill()
    out = tmp_path / "run"
    diccae(*_pretrain(store, out, "--tracking.uri", server.uri))
    assert _record(out) == {"uri": server.uri, "run_id": ""}
    assert main(["evaluate", "--out", str(out)]) == 0
    assert f"MLflow at {server.uri} lacks the run: results are" in capsys.readouterr().err
    server.start()
    diccae("report", "--out", str(out), "--no-sound")
    run, steps = _run(out), [line["step"] for line in lines(out / "metrics.jsonl")]
    assert run.info.status == "FINISHED"
    assert _steps(out, "loss") == steps
    files = _client(out).list_artifacts(run.info.run_id)
    assert "report.html" in {file.path for file in files}


@pytest.mark.usefixtures("tracked")
def test_a_run_that_mlflow_missed_begins_with_the_next_start_where_that_says(
    mlflow_up: Server,
    store: str,
    tmp_path: Path,
    diccae: Diccae,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, began = tmp_path / "run", list[str]()
    pretrain = InLab.pretrain

    def seen(lab: InLab, config: Any, data: Any, written: Written, span: Any) -> dict[str, Any]:
        began.append(_record(Path(written.out.path))["run_id"])
        return pretrain(lab, config, data, written, span)

    monkeypatch.setattr(InLab, "pretrain", seen)
    diccae(*_pretrain(store, out, "--tracking.uri", "http://127.0.0.1:9"))
    diccae(*_pretrain(store, out, "--tracking.uri", mlflow_up.uri))
    record = _record(out)
    assert began == ["", record["run_id"]], "before training, so that its curves are seen"
    assert record["uri"] == mlflow_up.uri
    assert _run(out).info.status == "FINISHED"
    assert main(_pretrain(store, out, "--tracking.uri", "http://127.0.0.1:9")) == 0
    assert f"the run stays in MLflow at {mlflow_up.uri}" in capsys.readouterr().err
    assert _record(out) == record


@pytest.mark.usefixtures("tracked")
def test_a_run_is_where_the_environment_says_and_says_so(
    mlflow_up: Server,
    store: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_up.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team")
    assert main(_pretrain(store, out)) == 0
    said = (
        f"MLflow at {mlflow_up.uri} (MLFLOW_TRACKING_URI), experiment team (MLFLOW_EXPERIMENT_NAME"
    )
    assert capsys.readouterr().err.count(said) == 1
    assert _record(out)["uri"] == mlflow_up.uri
    assert not (out / "mlflow.db").exists()
    team = _client(out).get_experiment_by_name("team")
    assert _run(out).info.experiment_id == team.experiment_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["evaluate", "--out", str(out)]) == 0
    said = f"stays in MLflow at {mlflow_up.uri}; MLFLOW_TRACKING_URI is http://127.0.0.1:9"
    assert said in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["finetune", "--out", str(out), *TUNED]) == 0
    assert main(["finetune", "--out", str(out), *TUNED, "--fresh"]) == 0
    assert _record(out)["uri"] == mlflow_up.uri, "another run, in the same place"


@pytest.mark.usefixtures("tracked")
def test_the_way_from_mlflow_to_folder_and_job_is_that_of_the_last_start(
    mlflow_up: Server,
    store: str,
    tmp_path: Path,
    diccae: Diccae,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, told = tmp_path / "run", list[dict[str, str]]()
    for job in ("raysubmit_1", "raysubmit_2"):
        given = json.dumps({"metadata": {"job_submission_id": job}})
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", given)
        more = ["--pretrain.log-every", job[-1]]
        diccae(*_pretrain(store, out, "--tracking.uri", mlflow_up.uri, *more))
        told.append({key: _run(out).data.tags[key] for key in ("out", "job", "attempt")})
    data = _run(out).data
    assert (data.params["pretrain.log_every"], data.tags["pretrain.log_every"]) == ("1", "2")
    assert told == [
        {"out": str(out), "job": "raysubmit_1", "attempt": "1"},
        {"out": str(out), "job": "raysubmit_2", "attempt": "2"},
    ]


TUNED = ["--finetune.epochs", "1", "--finetune.optim.lr", "5e-5"]


@pytest.mark.usefixtures("tracked")
def test_settings_in_mlflow_are_those_of_the_stage_that_used_them(
    mlflow_up: Server, store: str, tmp_path: Path, diccae: Diccae
) -> None:
    out = tmp_path / "run"
    kept = ["--data.validation-frac", "0.2", "--tracking.uri", mlflow_up.uri]
    diccae(*_pretrain(store, out, *kept))
    before = _run(out).data
    assert before.params["pretrain.epochs"] == "1"
    assert not [key for key in before.params if key.startswith(("finetune.", "evaluate."))]
    diccae("finetune", "--out", str(out), *TUNED)
    tuned = _run(out).data
    assert tuned.params["finetune.epochs"] == "1"
    assert tuned.params["finetune.optim.lr"] == "5e-05"
    assert tuned.tags["config_hash"] != before.tags["config_hash"]
    results = json.loads(
        diccae("evaluate", "--out", str(out), "--evaluate.split", "validation", "--json")
    )
    measured = _run(out).data
    assert measured.tags["evaluate.split"] == results["split"] == "validation"
    assert measured.tags["config_hash"] == results["config_hash"]


@pytest.mark.usefixtures("tracked")
def test_each_stage_says_which_start_logged_its_steps(
    mlflow_up: Server, store: str, tmp_path: Path, diccae: Diccae
) -> None:
    out = tmp_path / "run"
    diccae(*_pretrain(store, out, "--tracking.uri", mlflow_up.uri, "--pretrain.epochs", "3"))
    diccae("finetune", "--out", str(out), *TUNED)
    for metric, file, attempt in (
        ("attempt", "metrics.jsonl", 1),
        ("finetune/attempt", "finetune.jsonl", 2),
    ):
        points = _client(out).get_metric_history(_record(out)["run_id"], metric)
        told = [(line["step"], attempt) for line in lines(out / file)]
        assert sorted((point.step, point.value) for point in points) == told


@pytest.mark.usefixtures("tracked")
def test_a_param_that_an_earlier_version_left_is_overruled_by_a_tag(
    mlflow_up: Server, store: str, tmp_path: Path, diccae: Diccae
) -> None:
    out = tmp_path / "run"
    diccae(*_pretrain(store, out, "--tracking.uri", mlflow_up.uri))
    run_id = _record(out)["run_id"]
    for key, value in (("finetune.epochs", "9"), ("finetune.optim.lr", "5e-05")):
        _client(out).log_param(run_id, key, value)
    diccae("finetune", "--out", str(out), *TUNED)
    found = _run(out).data
    assert (found.params["finetune.epochs"], found.tags["finetune.epochs"]) == ("9", "1")
    assert "finetune.optim.lr" not in found.tags, "the param is right"
    assert "finetune.batch_size" in found.params, "the others are there"
    diccae("finetune", "--out", str(out), *TUNED, "--fresh")
    again = _run(out).data
    assert again.tags["fine_tuned_again_after"] == run_id
    assert again.params["finetune.epochs"] == "1"
    assert "finetune.epochs" not in again.tags, "another run has its own params"


def _with(password: str, uri: str) -> str:
    return uri.replace("://", f"://me:{password}@")


def _holding(text: str, folder: Path) -> list[str]:
    """Files of a folder that hold a text, by name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.name for path in files if text.encode() in path.read_bytes())


@pytest.mark.usefixtures("tracked")
def test_the_password_of_mlflow_is_in_run_json_alone(
    mlflow_up: Server,
    store: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, hub = tmp_path / "run", tmp_path / "hub"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", _with("s3cret", mlflow_up.uri))
    assert main(_pretrain(store, out)) == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", _with("0ther", "http://127.0.0.1:9"))
    assert main(["finetune", "--out", str(out), *TUNED]) == 0
    assert main(["evaluate", "--out", str(out)]) == 0
    for kind in ("encoder", "classifier"):
        model = ["--model", str(out / kind), "--out", str(hub / kind), "--to", "hub-folder"]
        assert main(["weights", "export", *model]) == 0
        card = json.loads((hub / kind / f"{kind}.json").read_text())
        told = {"uri": _with("***", mlflow_up.uri), "run_id": _record(out)["run_id"]}
        assert card["provenance"]["mlflow"] == told
    said = "".join(capfd.readouterr())
    assert f"the run stays in MLflow at {_with('***', mlflow_up.uri)}" in said
    assert not [password for password in ("s3cret", "0ther") if password in said]
    assert _holding("s3cret", tmp_path) == ["run.json"]
    assert _holding("0ther", tmp_path) == []
    assert _run(out).data.metrics["probe/audio"] > 0, "the password was kept for later stages"


@pytest.mark.usefixtures("tracked")
def test_mlflow_that_is_away_is_told_of_without_its_password(
    store: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, away = tmp_path / "run", "http://127.0.0.1:9"
    assert main(_pretrain(store, out, "--tracking.uri", _with("s3cret", away))) == 0
    assert main(["evaluate", "--out", str(out)]) == 0
    said = "".join(capfd.readouterr())
    assert f"MLflow at {_with('***', away)} lacks the run" in said
    assert "s3cret" not in said
    assert _holding("s3cret", out) == ["config.yaml", "run.json"]


@pytest.mark.usefixtures("tracked")
def test_the_password_of_mlflow_is_not_shown_in_mlflow(
    mlflow_up: Server, store: str, tmp_path: Path, diccae: Diccae
) -> None:
    out = tmp_path / "run"
    diccae(*_pretrain(store, out, "--tracking.uri", _with("s3cret", mlflow_up.uri)))
    assert _run(out).data.params["tracking.uri"] == _with("***", mlflow_up.uri)
    [file] = _client(out).list_artifacts(_record(out)["run_id"])
    assert file.path == "config.yaml"
    assert _holding("s3cret", mlflow_up.folder) == []


@pytest.mark.usefixtures("tracked")
def test_json_of_a_run_in_a_server_is_all_of_stdout(
    mlflow_up: Server, store: str, tmp_path: Path, diccae: Diccae
) -> None:
    uri = ["--tracking.uri", mlflow_up.uri]
    printed = diccae(*_pretrain(store, tmp_path / "run", *uri), "--json")
    assert json.loads(printed)["n_train"] > 0
    assert _record(tmp_path / "run")["run_id"], "it is in the server"


@pytest.mark.usefixtures("tracked")
def test_a_stage_of_a_finished_run_is_seen_to_run_and_to_end(
    mlflow_up: Server,
    store: str,
    tmp_path: Path,
    diccae: Diccae,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, seen = tmp_path / "run", list[tuple[str, list[str]]]()
    diccae(*_pretrain(store, out, "--tracking.uri", mlflow_up.uri))
    run_id, finetune = _record(out)["run_id"], InLab.finetune

    def look(lab: InLab, *arguments: Any) -> dict[str, Any]:
        files = [file.path for file in _client(out).list_artifacts(run_id)]
        seen.append((_run(out).info.status, files))
        return finetune(lab, *arguments)

    def stop(lab: InLab, *arguments: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(InLab, "finetune", stop)
    assert main(["finetune", "--out", str(out), *TUNED]) == 130
    assert _run(out).info.status == "KILLED"
    monkeypatch.setattr(InLab, "finetune", look)
    diccae("finetune", "--out", str(out), *TUNED)
    assert seen == [("RUNNING", ["config.yaml"])]
    assert _run(out).info.status == "FINISHED"
    # As a SIGKILL in the middle of a stage leaves it.
    _client(out).update_run(run_id, status="RUNNING")
    diccae("evaluate", "--out", str(out))
    assert _run(out).info.status == "KILLED"


@pytest.fixture
def without_mlflow(monkeypatch: pytest.MonkeyPatch, in_lab: None) -> None:
    """Stages as in a bucket, which has no MLflow unless a start names one."""
    monkeypatch.setattr(InLab, "attach", OnRay.attach)


@pytest.mark.usefixtures("without_mlflow")
@pytest.mark.parametrize("stage", ["finetune", "evaluate"])
def test_a_run_begun_without_mlflow_is_in_the_one_that_a_later_stage_names(
    stage: str,
    mlflow_up: Server,
    store: str,
    tmp_path: Path,
    diccae: Diccae,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, uri = tmp_path / "run", ["--tracking.uri", mlflow_up.uri]
    diccae(*_pretrain(store, out))
    diccae("finetune", "--out", str(out), *TUNED, *(uri if stage == "finetune" else ()))
    if stage == "evaluate":
        assert main(["evaluate", "--out", str(out)]) == 0
        assert "evaluate with --tracking.uri makes it one" in capsys.readouterr().err
        assert not _record(out)["run_id"]
    diccae("evaluate", "--out", str(out), *uri)
    run = _run(out)
    assert _record(out)["uri"] == mlflow_up.uri
    assert run.info.status == "FINISHED"
    assert run.data.params["finetune.epochs"] == "1"
    assert "probe/audio" in run.data.metrics
    for metric, file in (("loss", "metrics.jsonl"), ("finetune/loss", "finetune.jsonl")):
        assert _steps(out, metric) == [line["step"] for line in lines(out / file)]


def test_an_ingest_is_where_the_environment_says_with_the_way_to_its_job(
    mlflow_up: Server,
    store: str,
    tmp_path: Path,
    diccae: Diccae,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clips, few = Path(store).parent / "clips", tmp_path / "few.csv"
    few.write_text("".join((clips / "clips.csv").read_text().splitlines(keepends=True)[:2]))
    job = json.dumps({"metadata": {"job_submission_id": "raysubmit_7"}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_up.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ingests")
    source = ["--clips", str(few), "--videos", str(clips / "videos")]
    diccae("ingest", *source, "--store", str(tmp_path / "store"), "--config", SMOKE)
    client = mlflow_client(mlflow_up.uri)
    [run] = client.search_runs([client.get_experiment_by_name("ingests").experiment_id])
    assert run.data.metrics["ok"] == 2
    assert run.data.tags["store.uri"] == str(tmp_path / "store")
    assert run.data.tags["job"] == "raysubmit_7"


def _record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())["mlflow"]
    return found


def _client(out: Path) -> Any:
    return mlflow_client(_record(out)["uri"])


def _run(out: Path) -> Any:
    return _client(out).get_run(_record(out)["run_id"])


def _steps(out: Path, metric: str) -> list[int]:
    points = _client(out).get_metric_history(_record(out)["run_id"], metric)
    return sorted(point.step for point in points)
