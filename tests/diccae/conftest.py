"""Commands run in this process, on the session's Ray, and one small store they share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from support.runs import N_TEST, N_TRAIN, SMOKE

from diccae.cli import main

Diccae = Callable[..., str]


@pytest.fixture
def diccae(ray_session: None, capsys: pytest.CaptureFixture[str]) -> Diccae:
    """Runs a command that has to succeed; returns what it printed."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = main(arguments)
        printed = capsys.readouterr()
        assert code == 0, f"{arguments}: {printed.err[-3000:]}"
        return printed.out

    return run


@pytest.fixture(scope="session")
def store(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """N_TRAIN + N_TEST clips with the features of the smoke config; mlflow.db lies beside it.

    Made once for all processes of the suite.
    """
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "ingested"
    with FileLock(f"{place}.lock"):
        if not (place / "done").exists():
            _ingest(place)
            (place / "done").touch()
    return str(place / "store")


def _ingest(place: Path) -> None:
    clips, uri = place / "clips", str(place / "store")
    sizes = ["--train", str(N_TRAIN), "--test", str(N_TEST)]
    assert main(["synth", "--out", str(clips), *sizes]) == 0
    source = ["--clips", str(clips / "clips.csv"), "--videos", str(clips / "videos")]
    tracked = ["--tracking.uri", f"sqlite:///{place}/mlflow.db"]
    assert main(["ingest", *source, "--store", uri, "--config", SMOKE, *tracked]) == 0
