"""Ctrl-C and SIGTERM, as real signals to the real command: what is done is kept."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import SMOKE

from pipeline.maintenance import status
from pipeline.synth import write_clips


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 128 clips in the folder `videos` beside it."""
    return write_clips(tmp_path_factory.mktemp("data") / "synth", 112, 16, seed=1, size=64)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_ingest_commits_what_is_done(name: str, csv: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    command = [sys.executable, "-m", "diccae", "ingest", "--clips", str(csv)]
    command += ["--videos", str(csv.parent / "videos"), "--store", store, "--config", SMOKE]
    # Nothing but the end of the run commits.
    command += ["--ingest.shard-clips", "16", "--ingest.commit-shards", "1000"]
    command += ["--ingest.commit-seconds", "3600"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stderr
    progress = next(line for line in run.stderr if "left" in line)
    n_done = int(progress.split(" ok ")[1].split()[0])
    if name == "SIGINT":
        os.killpg(run.pid, signal.SIGINT)  # As a terminal does.
    else:
        run.send_signal(signal.SIGTERM)
    assert "interrupted; run the same command again" in run.communicate(timeout=60)[1]
    assert run.returncode == 130
    kept = status(store)["ok"]
    assert n_done <= kept < 128
