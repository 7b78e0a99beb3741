"""A registered model answers where nothing of ours is at hand, many at once, never with a 500."""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from support.mlflow_server import Server, answers
from support.models import CLASSES, evaluated, saved_models
from support.polling import wait_until
from support.ports import free_port

from diccae.cli import main
from pipeline.synth import write_clips
from training.cluster_config import TrackingConfig
from training.predict import registry
from training.predict.find import find_models
from training.predict.pyfunc import ClipModel
from training.predict.registry import save_pyfunc
from training.tracking.mlflow_run import create_run
from training.weights.files import read_card

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` with models that were evaluated, `a.mp4`, and `broken.mp4`."""
    place = tmp_path_factory.mktemp("registry")
    saved_models(str(place / "run"))
    evaluated(place / "run")
    write_clips(place / "made", n_train=1, n_test=0, seed=1, size=32, workers=1)
    [clip] = (place / "made" / "videos").iterdir()
    clip.rename(place / "a.mp4")
    (place / "broken.mp4").write_bytes(b"no video at all")
    return place


def _tracked(run: Path, uri: str | None) -> str:
    """Give a run folder its MLflow run. Returns: where that is."""
    handle = create_run(TrackingConfig(uri=uri), str(run), {}, {}, {})
    record = {"name": "run", "mlflow": {"uri": handle.uri, "run_id": handle.run_id}}
    (run / "run.json").write_text(json.dumps(record))
    return handle.uri


def _elsewhere(**more: str) -> dict[str, str]:
    """An environment without a way to our packages but through the model."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    # MLflow starts uvicorn by its name.
    kept["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), kept["PATH"]))
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    return {**kept, **quiet, "OMP_NUM_THREADS": "1", **more}


_ASKED = """
import json, sys
import mlflow.pyfunc
import pandas as pd
uri, clip, broken = sys.argv[1:]
model = mlflow.pyfunc.load_model(uri)
found = {"list": model.predict([clip, broken]), "one": model.predict(clip)}
content = open(clip, "rb").read()
found["content"] = model.predict(pd.DataFrame({"content": [content]}))
found["none"] = model.predict(pd.DataFrame({"clip": [None]}))
found["example"] = model.predict(model.input_example)
import training
found = {name: table.to_dict("records") for name, table in found.items()}
print(json.dumps({**found, "code": training.__file__}))
"""


@pytest.mark.slow
def test_a_registered_model_is_loaded_in_another_folder_with_its_own_code(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = _tracked(place / "run", None)
    assert main(["register", "--model", str(place / "run"), "--name", "small"]) == 0
    assert "models:/small@champion: version 1" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-c", _ASKED, "models:/small@champion"]
        + [str(place / name) for name in ("a.mp4", "broken.mp4")],
        cwd=tmp_path,
        env=_elsewhere(MLFLOW_TRACKING_URI=uri),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert "/pyfunc/classifier/code/training/" in found["code"]
    good, broken = found["list"]
    assert good["class"] in CLASSES
    assert (good["reason"], good["decided_by"]) == (None, "audio")
    assert (broken["reason"], broken["class"]) == ("open_failed", None)
    for name in ("one", "content"):
        [same] = found[name]
        assert same["p"] == pytest.approx(good["p"], abs=1e-6)
    assert "neither a path or URI nor bytes" in found["none"][0]["detail"]
    assert found["example"][0]["reason"] is None
    _check_found_by_name(uri, capsys)


def _check_found_by_name(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--model models:/...` finds the folder that was registered."""
    for name in ("models:/small@champion", "models:/small/1"):
        found = find_models(name, uri)
        assert read_card(found.main, "classifier")[0].classes == CLASSES
    asked = ["--model", "models:/gone@champion", "--tracking-uri", uri]
    assert main(["predict", *asked, "a.mp4"]) == 1
    printed = capsys.readouterr().err
    assert "models:/gone@champion: MLflow at sqlite:///" in printed
    assert "name the one that has it with --tracking-uri or MLFLOW_TRACKING_URI" in printed
    assert printed.count("\n") == 1


def test_where_no_mlflow_is_named_none_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: "sqlite:///mlflow.db")
    assert main(["predict", "--model", "models:/vgg@champion", "a.mp4"]) == 1
    assert "mlflow.db: no such MLflow database. Name the MLflow" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_machine_without_decord_saves_a_model_that_asks_for_none(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on aarch64; one with decord asks for it on x86-64 alone."""

    def asked_for(folder: Path) -> str:
        save_pyfunc(str(place / "run" / "classifier"), folder)
        return (folder / "requirements.txt").read_text()

    assert re.search(
        r"decord==0\.6\.0 ?; platform_machine == .x86_64", asked_for(tmp_path / "with")
    )

    def installed(name: str) -> str:
        if name == "decord":
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr(registry, "version", installed)
    without = asked_for(tmp_path / "without")
    assert "torch==" in without
    assert "decord" not in without


def test_a_run_that_mlflow_does_not_know_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["register", "--model", str(tmp_path), "--name", "x"]) == 2
    assert "no run.json, so no run" in capsys.readouterr().err
    saved_models(str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({"name": "run"}))
    assert main(["register", "--model", str(tmp_path), "--name", "x"]) == 1
    assert "its run is not in MLflow yet" in capsys.readouterr().err


@pytest.fixture(scope="module")
def served(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of `mlflow models serve`, which has the model from a real server."""
    folder = tmp_path_factory.mktemp("served")
    server, port = Server(folder), free_port()
    serving = None
    try:
        server.start()
        saved_models(str(folder / "run"))
        _tracked(folder / "run", server.uri)
        assert main(["register", "--model", str(folder / "run"), "--name", "small"]) == 0
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
        command += ["-m", "models:/small@champion", "-h", "127.0.0.1", "-p", str(port)]
        with open(folder / "serving.log", "wb") as log:
            serving = subprocess.Popen(
                command,
                cwd=folder,
                env=_elsewhere(MLFLOW_TRACKING_URI=server.uri),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        ping = f"http://127.0.0.1:{port}/ping"
        wait_until(lambda: serving.poll() is not None or answers(ping), 300)
        assert serving.poll() is None, (folder / "serving.log").read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        if serving is not None:
            os.killpg(serving.pid, signal.SIGKILL)
            serving.wait()
        server.kill()


def _ask(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.status == 200
        found: list[dict[str, Any]] = json.loads(answer.read())["predictions"]
        return found


@pytest.mark.slow
def test_ten_requests_at_once_of_any_size_are_answered_each_with_its_own(
    served: str, place: Path
) -> None:
    clip, broken = str(place / "a.mp4"), str(place / "broken.mp4")
    content = base64.b64encode((place / "a.mp4").read_bytes()).decode()
    [good] = _ask(served, {"inputs": [clip]})
    asked = [
        {"dataframe_split": {"columns": ["clip"], "data": [[clip]] * n + [[broken]]}}
        for n in range(8)
    ]
    asked += [{"dataframe_split": {"columns": ["content"], "data": [[content]]}}]
    asked += [{"dataframe_split": {"columns": ["content"], "data": [["@"]]}}]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda body: _ask(served, body), asked))
    for n, rows in enumerate(found[:8]):
        assert [row["reason"] for row in rows] == [None] * n + ["open_failed"]
        assert all(row["p"] == pytest.approx(good["p"], abs=1e-6) for row in rows[:n])
    assert found[8][0]["p"] == pytest.approx(good["p"], abs=1e-6)
    assert found[9][0]["reason"] == "open_failed"


@pytest.mark.slow
def test_the_examples_of_the_page_run_as_they_are_written(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "run", "out/run")
    Path("my/clips").mkdir(parents=True)
    for name in ("clip.mp4", "my/clips/b.mp4"):
        shutil.copy(place / "a.mp4", name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", _tracked(Path("out/run"), None))
    page = (ROOT / "docs" / "predict.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("diccae ")]
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    assert len(lines) >= 6
    assert "most often confused with" in capsys.readouterr().out
    assert Path("page.html").exists()
    assert Path("out/hub/model.safetensors").exists()
    # And `tracking.register_as`, which the page names.
    Path("out/run/config.yaml").write_text("tracking: {register_as: by-report}")
    assert main(["report", "--out", "out/run"]) == 0
    assert find_models("models:/by-report@candidate").classifier


@pytest.mark.slow
def test_a_registered_encoder_answers_with_embeddings(place: Path) -> None:
    model = ClipModel(str(place / "run" / "encoder"))
    try:
        table = model.predict([str(place / "a.mp4"), str(place / "broken.mp4")])
    finally:
        model.close()
    assert list(table.columns) == ["clip", "reason", "detail", "audio", "video", "fusion"]
    assert len(table["fusion"][0]) == 8
    assert (table["fusion"][1], table["reason"][1]) == (None, "open_failed")
