"""Commands run in this process, the lab they may compute in, and one small store they share."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from support.runs import N_TEST, N_TRAIN, SMOKE

from diccae.cli import main

if TYPE_CHECKING:
    from training.lab.lab import Lab

Diccae = Callable[..., str]


@pytest.fixture
def diccae(capsys: pytest.CaptureFixture[str]) -> Diccae:
    """Runs a command that has to succeed; returns what it printed."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = main(arguments)
        printed = capsys.readouterr()
        assert code == 0, f"{arguments}: {printed.err[-3000:]}"
        return printed.out

    return run


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
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


@pytest.fixture(scope="module")
def features(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips of `store`, decoded for the lab."""
    from pipeline.store.store import FeatureStore
    from training.lab.features import decode_store

    folder = tmp_path_factory.mktemp("features")
    decode_store(FeatureStore.open(store).snapshot(), folder)
    return folder


@pytest.fixture
def lab(features: Path, store: str) -> Iterator["Lab"]:
    """A lab over the clips of `store`; the threads of this process are as before afterwards."""
    import torch

    from pipeline.store.store import FeatureStore
    from training.lab.features import open_features
    from training.lab.lab import Lab

    n_threads = torch.get_num_threads()
    yield Lab(open_features(features, FeatureStore.open(store).snapshot().spec))
    torch.set_num_threads(n_threads)


@pytest.fixture
def in_lab(lab: "Lab", mlflow_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of commands compute in this process, with the bits of Ray and without its start."""
    from diccae.stages import evaluate, finetune, pretrain
    from diccae.stages.backend import InLab

    for stage, name in (
        (pretrain, "run_pretrain"),
        (finetune, "run_finetune"),
        (evaluate, "run_evaluate"),
    ):
        in_lab = functools.partial(getattr(stage, name), backend=InLab(lab))
        monkeypatch.setattr(stage, name, in_lab)


def _ingest(place: Path) -> None:
    clips, uri = place / "clips", str(place / "store")
    sizes = ["--train", str(N_TRAIN), "--test", str(N_TEST)]
    assert main(["synth", "--out", str(clips), *sizes]) == 0
    source = ["--clips", str(clips / "clips.csv"), "--videos", str(clips / "videos")]
    more = ["--tracking.uri", f"sqlite:///{place}/mlflow.db", "--ingest.local-clips", "1000"]
    assert main(["ingest", *source, "--store", uri, "--config", SMOKE, *more]) == 0
