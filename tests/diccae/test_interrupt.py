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
from pipeline.store.maintenance import status

N_CLIPS = 96


@pytest.fixture
def source(store: str, tmp_path: Path) -> list[str]:
    """Options for N_CLIPS of the clips that `store` was made from."""
    clips, some = Path(store).parent / "clips", tmp_path / "clips.csv"
    some.write_text("".join((clips / "clips.csv").open().readlines()[:N_CLIPS]))
    return ["--clips", str(some), "--videos", str(clips / "videos")]


def test_ctrl_c_while_a_command_is_imported_is_told_like_any_other() -> None:
    code = (
        "import os, signal, sys\n"
        "class Import:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'tyro': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Import())\n"
        "from diccae.cli import run\n"
        "run()"
    )
    command = [sys.executable, "-c", code, "synth", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    said = "diccae synth: interrupted; run the same command again to go on\n"
    assert (done.returncode, done.stderr) == (130, said)


def test_a_terminated_ingest_without_ray_commits_what_is_done(
    source: list[str], tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    command = [sys.executable, "-m", "diccae", "ingest", *source, "--store", store]
    command += ["--config", SMOKE, "--ingest.local-clips", "1000", "--ingest.shard-clips", "8"]
    command += ["--ingest.commit-shards", "1000", "--ingest.commit-seconds", "3600"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert run.stderr
    progress = next(line for line in run.stderr if "left" in line)
    run.terminate()
    assert "interrupted; run the same command again" in run.communicate(timeout=200)[1]
    assert run.returncode == 130
    assert int(progress.split(" ok ")[1].split()[0]) <= status(store)["ok"] < N_CLIPS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_ingest_commits_what_is_done(
    ray_session: None,
    name: str,
    source: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGINT as a terminal sends it, to a command with a Ray of its own; SIGTERM as `ray job stop`
    does, to one that joined a cluster."""
    interrupted = str(tmp_path / "store")
    command = [sys.executable, "-m", "diccae", "ingest", *source, "--store", interrupted]
    command += ["--config", SMOKE]
    # Nothing but the end of the run commits.
    command += ["--ingest.shard-clips", "16", "--ingest.commit-shards", "1000"]
    command += ["--ingest.commit-seconds", "3600", "--ingest.workers", "2"]
    command += ["--ingest.local-clips", "0"]
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
    kept = status(interrupted)["ok"]
    assert n_done <= kept < N_CLIPS
    if name == "SIGTERM":
        capsys.readouterr()
        # What is left needs no Ray.
        assert main([*command[3:], "--ingest.local-clips", "1000", "--json"]) == 0
        counts = json.loads(capsys.readouterr().out)
        left = N_CLIPS - kept
        assert (counts["new"], counts["ok"], counts["unchanged"]) == (left, left, kept)
