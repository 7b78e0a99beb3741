"""The doctor finds what is wrong, says what to do, and never falls ill itself."""

import importlib.metadata
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support.mlflow_server import Server

from diccae.cli import main
from diccae.doctor import child, libraries, machine, services
from diccae.doctor.check import Check
from diccae.doctor.examine import run_doctor
from pipeline.config import FeatureSpec
from pipeline.store.store import FeatureStore


def test_this_machine_is_well() -> None:
    checks = [libraries.check_python(), libraries.check_versions(), libraries.check_codecs()]
    checks += [libraries.check_decord(), libraries.check_devices()]
    assert [check for check in checks if not check.ok] == []
    decord = checks[3].detail
    assert "h264" in decord.split("; through PyAV")[0]


@pytest.mark.slow
def test_ray_starts_and_leaves_no_token_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert machine.check_ray_start().ok
    assert not (tmp_path / ".ray").exists()


def test_wrong_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "decord":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.10.0+cu130" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    check = libraries.check_versions()
    assert not check.ok
    assert "decord is missing" in check.detail
    assert "torch 2.10.0+cu130, pinned 2.11.0" in check.detail
    assert "constraints.txt" in check.hint


@pytest.mark.parametrize(
    ("flags", "cores", "ok", "said"),
    [
        ({"avx2"}, "Barcelona", False, "OPENBLAS_CORETYPE"),
        ({"avx2", "avx512f"}, "Haswell", True, "SkylakeX"),
        ({"avx2", "avx512f"}, "SkylakeX", True, ""),
        ({"avx2"}, "Haswell", True, ""),
    ],
)
def test_blas_that_does_not_know_the_cpu_is_found(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], cores: str, ok: bool, said: str
) -> None:
    monkeypatch.setattr(libraries, "_cpu_flags", lambda: flags)
    found = json.dumps([["/x/faiss_gpu.libs/lib.so", "0.3.15", cores]])
    monkeypatch.setattr(child, "run", lambda code, timeout_s: found)
    check = libraries.check_blas()
    assert check.ok is ok
    assert f"faiss {cores}" in check.detail
    assert said in check.hint if said else check.hint == ""


def test_a_library_that_crashes_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_DECORD", "import os; os.abort()")
    check = libraries.check_decord()
    assert not check.ok
    assert "exit status -6" in check.detail
    assert "pyav" in check.hint


def test_decord_is_missed_only_where_it_has_a_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.decode.choice.importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(libraries.platform, "machine", lambda: "aarch64")
    check = libraries.check_decord()
    assert check.ok
    assert "no wheel for aarch64" in check.detail
    monkeypatch.setattr(libraries.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(libraries, "_DECORD", "import none_such")
    assert not libraries.check_decord().ok


def test_ray_folder_too_long_for_a_socket_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    check = machine.check_ray_folder()
    assert not check.ok
    assert "too long for a socket" in check.detail
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert machine.check_ray_folder().ok
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/missing")
    assert "not writable" in machine.check_ray_folder().detail


def test_token_is_missed_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert services.check_token().ok
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert not services.check_token().ok
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
    assert "RAY_AUTH_TOKEN_PATH" in services.check_token().detail
    monkeypatch.setenv("RAY_AUTH_TOKEN", "5" * 64)
    check = services.check_token()
    assert check.ok
    assert "5" * 64 not in check.detail


def test_full_disk_and_full_shared_memory_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=10 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    for check in (machine.check_disk(None), machine.check_shared_memory()):
        assert not check.ok
        assert check.hint


def test_store_is_opened_and_a_missing_one_is_found(tmp_path: Path) -> None:
    FeatureStore.create(str(tmp_path / "store"), FeatureSpec())
    check = services.check_store(str(tmp_path / "store"))
    assert check.ok
    assert "0 clips" in check.detail
    missing = services.check_store(str(tmp_path / "missing"))
    assert not missing.ok
    assert "no feature store" in missing.detail


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def something_else() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_mlflow_lets_us_in_or_not(tmp_path: Path) -> None:
    server = Server(tmp_path, "--allowed-hosts", "localhost:*")
    try:
        server.start()
        assert services.check_mlflow(f"http://localhost:{server.port}").ok
        check = services.check_mlflow(server.uri)
    finally:
        server.kill()
    assert not check.ok, "/health is answered, and no run is taken"
    assert "Invalid Host header" in check.detail
    assert "--allowed-hosts" in check.hint


def test_mlflow_is_there_or_not(something_else: str, tmp_path: Path) -> None:
    assert services.check_mlflow(f"sqlite:///{tmp_path}/mlflow.db").ok
    assert services.check_mlflow(f"sqlite:///{tmp_path}/not/made/mlflow.db").ok
    (tmp_path / "file").touch()
    in_a_file = f"sqlite:///{tmp_path}/file/mlflow.db"
    for uri in (something_else, "http://127.0.0.1:9", in_a_file):
        check = services.check_mlflow(uri)
        assert not check.ok
        assert check.hint


def test_weights_without_the_run_they_are_for_are_not_passed_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--init", "cav-mae.pth"]) == 2
    assert "--init cav-mae.pth is checked against a run: give its --config" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("option", ["--tracking-uri", "--mlflow-uri"])
def test_mlflows_address_is_given_as_to_predict_or_as_in_earlier_versions(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str | None] = []

    def run_doctor(store: str | None, tracking_uri: str | None, *more: object) -> list[Check]:
        asked.append(tracking_uri)
        return []

    monkeypatch.setattr("diccae.doctor.examine.run_doctor", run_doctor)
    assert main(["doctor", option, "http://mlflow:5000"]) == 0
    assert asked == ["http://mlflow:5000"]


def test_whatever_is_named_is_checked_and_every_failure_has_a_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(code: str, timeout_s: float, *args: str, env: object = None) -> str:
        raise RuntimeError("cannot load")

    monkeypatch.setattr(child, "run", broken)
    checks = run_doctor(str(tmp_path / "none"), "http://127.0.0.1:9", "http://127.0.0.1:9")
    failed = {check.name: check for check in checks if not check.ok}
    assert {"store", "mlflow", "cluster", "decord", "devices", "blas", "ray start"} <= failed.keys()
    assert all(isinstance(check, Check) and check.hint for check in failed.values())
    assert "no answer" in failed["cluster"].detail
