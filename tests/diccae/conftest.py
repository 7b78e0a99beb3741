"""Real commands in real processes, and one small store they share."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "vggsound-smoke.yaml")

Diccae = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command() -> Callable[..., list[str]]:
    """The command line of `diccae` with these arguments."""
    return lambda *arguments: [sys.executable, "-m", "diccae", *arguments]


@pytest.fixture(scope="session")
def diccae(command: Callable[..., list[str]]) -> Diccae:
    """Runs a command to its end, in a folder; it has to succeed."""

    def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(*arguments), capture_output=True, text=True, timeout=280, cwd=cwd
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr[-3000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, diccae: Diccae) -> str:
    """208 clips, ingested with the specs of the smoke config."""
    place = tmp_path_factory.mktemp("ingested")
    clips, uri = place / "clips", str(place / "store")
    diccae("synth", "--out", str(clips), "--train", "160", "--test", "48")
    source = ["--clips", str(clips / "clips.csv"), "--videos", str(clips / "videos")]
    first = diccae("ingest", *source, "--store", uri, "--config", CONFIG, "--json")
    summary = json.loads(first.stdout)
    assert (summary["new"], summary["ok"], summary["failed"]) == (208, 208, 0)
    again = diccae("ingest", *source, "--store", uri, "--config", CONFIG, "--json")
    assert json.loads(again.stdout)["unchanged"] == 208
    return uri
