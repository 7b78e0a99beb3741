"""Ctrl-C and SIGTERM, as real signals to the real command: what is done is kept."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ray_env
from support.runs import SMOKE

from diccae.cli import main
from pipeline.ingest.maintenance import status
from pipeline.synth import write_clips

N_CLIPS = 96


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of N_CLIPS clips in the folder `videos` beside it."""
    return write_clips(tmp_path_factory.mktemp("data") / "synth", N_CLIPS - 16, 16, seed=1, size=64)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_ingest_commits_what_is_done(
    ray_session: None,
    name: str,
    csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGINT as a terminal sends it, to a command with a Ray of its own; SIGTERM as `ray job stop`
    does, to one that joined a cluster."""
    store = str(tmp_path / "store")
    command = [sys.executable, "-m", "diccae", "ingest", "--clips", str(csv)]
    command += ["--videos", str(csv.parent / "videos"), "--store", store, "--config", SMOKE]
    # Nothing but the end of the run commits.
    command += ["--ingest.shard-clips", "16", "--ingest.commit-shards", "1000"]
    command += ["--ingest.commit-seconds", "3600", "--ingest.workers", "2"]
    env = dict(os.environ) if name == "SIGINT" else ray_env()
    run = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env
    )
    assert run.stderr
    progress = next(line for line in run.stderr if "left" in line)
    n_done = int(progress.split(" ok ")[1].split()[0])
    if name == "SIGINT":
        os.killpg(run.pid, signal.SIGINT)
    else:
        run.send_signal(signal.SIGTERM)
    assert "interrupted; run the same command again" in run.communicate(timeout=200)[1]
    assert run.returncode == 130
    kept = status(store)["ok"]
    assert n_done <= kept < N_CLIPS
    if name == "SIGTERM":
        capsys.readouterr()
        assert main([*command[3:], "--json"]) == 0
        counts = json.loads(capsys.readouterr().out)
        left = N_CLIPS - kept
        assert (counts["new"], counts["ok"], counts["unchanged"]) == (left, left, kept)
