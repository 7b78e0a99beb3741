"""What tests share in one process: an embedded Ray cluster, private to them; never a filesystem."""

import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest
from support.processes import shared_server
from support.warm_workers import warm_workers

if TYPE_CHECKING:
    from support.mlflow_server import Server

# Tiny tensors: a second BLAS thread costs more than it brings, and disturbs the tests beside it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests say where their runs are written down, and no MLflow of who starts them may get those.
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(name, None)

# A shell's background job ignores SIGINT, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ray's helpers that no test looks at would take a tenth of the suite's time.
_RAY_ENV = {
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",
    "REPORTER_UPDATE_INTERVAL_MS": "3600000",
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_worker_maximum_startup_concurrency": "16",
    "RAY_AIR_NEW_OUTPUT": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}


_LONGEST = [
    "clustering/pool/test_pool.py",
    "on_ray/test_ray_training.py",
    "diccae/test_whole.py",
    "ingest/test_faults.py",
    "store/test_object_store.py",
    "deploy/test_submit.py",
    "tracking/test_tracker.py",
    "diccae/test_interrupt.py",
    "ingest/test_on_threads.py",
]
"""Files that take a minute of CPU or so: one that begins last would leave a process idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those that need Ray, then what evens out the shares."""
    with_ray = {item.path for item in items if "ray_session" in getattr(item, "fixturenames", ())}

    def place(item: pytest.Item) -> int:
        for i, name in enumerate(_LONGEST):
            if item.path.as_posix().endswith(name):
                return i
        return len(_LONGEST) + (item.path not in with_ray)

    items.sort(key=place)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """An embedded Ray cluster of 4 logical CPUs, shut down after the last test."""
    import ray

    os.environ.update(_RAY_ENV)
    # Else Ray writes one into the home, where sessions side by side would replace each other's.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())
    # A short private folder: socket paths are limited to 107 bytes, and a shared one could make
    # this session join somebody else's cluster.
    folder = tempfile.TemporaryDirectory(prefix="dray", dir="/tmp", ignore_cleanup_errors=True)
    with folder as tmp, warm_workers() as python:
        os.makedirs(f"{tmp}/ray", exist_ok=True)
        os.environ["RAY_TMPDIR"] = tmp
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", python)
            ray.init(
                address="local",
                num_cpus=4,
                include_dashboard=False,
                object_store_memory=300 * 2**20,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=tmp,
            )
        yield
        ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def shared_processes() -> Iterator[None]:
    """See `support.fbanks` and `support.processes`."""
    from support.fbanks import shared_process

    with shared_process(), shared_server():
        yield


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """See `support.mlflow_tables`; for whoever has MLflow make many databases in this process."""
    from support.mlflow_tables import ready_tables

    shared = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        ready_tables(shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared, patch)
        yield


@pytest.fixture(scope="session")
def migrated_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables made once (4 s); tests copy it."""
    from training.tracking.client import mlflow_client

    folder = tmp_path_factory.mktemp("mlflow")
    mlflow_client(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def mlflow_server(
    migrated_db: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator["Server"]:
    """A server of this file's tests, which start and kill it."""
    from support.mlflow_server import Server

    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_db, folder / "mlflow.db")
    server = Server(folder)
    yield server
    server.kill()


@pytest.fixture
def mlflow_up(mlflow_server: "Server") -> "Server":
    """The server, as the test before left it or started: its start takes five seconds of CPU."""
    if mlflow_server.process is None:
        mlflow_server.start()
    return mlflow_server


@pytest.fixture(scope="module")
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """URI of a bucket of this file's tests, behind a `support.unsteady.Unsteady`.

    Named by the file: a process keeps footers of shards by their URI.
    """
    from support.unsteady import unsteady_bucket

    name = f"{request.path.parent.name}-{request.path.stem}".replace("_", "-")
    with unsteady_bucket(name) as uri:
        yield uri


@pytest.fixture(autouse=True)
def own_filesystems() -> Iterator[None]:
    """Each test opens its filesystems itself.

    fsspec keeps them for the whole process, with the endpoint and the keys of the environment
    that they were opened in.
    """
    yield
    for filesystem in set(fsspec.registry.values()):
        filesystem.clear_instance_cache()
