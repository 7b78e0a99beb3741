"""A run with --out s3://: killed, gone on with, finished; no file on this machine, and the bits of
a run in a folder."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.polling import wait_until
from support.runs import SMOKE

from clustering.rounds.files import load_round
from pipeline.storage import Location
from training.tracking.tracker import read_metrics

STAGES = """
import json, sys
from diccae.cli import main
for command in json.loads(sys.argv[1]):
    if code := main(command):
        sys.exit(code)
"""
N_STEPS = 9


def _run(commands: list[list[str]], cwd: Path) -> "subprocess.Popen[bytes]":
    """Commands one after the other, on one Ray of their own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", STAGES, json.dumps(commands)]
    return subprocess.Popen(command, cwd=cwd, env=env)


def _pretrain(store: str, out: str) -> list[str]:
    return ["pretrain", "--config", SMOKE, "--store", store, "--out", out]


def _finished(store: str, out: str, vectors: str) -> list[list[str]]:
    embed = ["embed", "--store", store, "--config", SMOKE, "--encoder", f"{out}/encoder"]
    return [
        _pretrain(store, out),
        ["finetune", "--out", out],
        ["evaluate", "--out", out],
        ["report", "--out", out],
        [*embed, "--out", vectors],
    ]


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_ends_with_the_bits_of_one_in_a_folder(
    bucket: str, store: str, tmp_path: Path
) -> None:
    cwd, out = tmp_path / "cwd", f"{bucket}/team/run"
    cwd.mkdir()
    run = Location(out)
    first = _run([_pretrain(store, out)], cwd)

    def is_saved() -> bool:
        return any(run.exists(f"pretrain/{name}/state.pt") for name in run.entries("pretrain"))

    wait_until(is_saved, 400, "a checkpoint", running=first)
    first.kill()
    first.wait()
    local = str(tmp_path / "local")
    both = _finished(store, out, f"{bucket}/vectors.parquet")
    both += _finished(store, local, str(tmp_path / "vectors.parquet"))
    assert _run(both, cwd).wait(400) == 0
    assert not list(cwd.iterdir())
    assert _bits(run) == _bits(Location(local))
    with Location(bucket).fetched("vectors.parquet") as path:
        assert pq.read_table(path).equals(pq.read_table(tmp_path / "vectors.parquet"))
    assert len(run.read_bytes("report.html")) > 50_000
    with run.fetched("metrics.jsonl") as path:
        lines = list(read_metrics(path))
    assert lines[-1]["step"] == N_STEPS
    assert {line["attempt"] for line in lines} == {1.0, 2.0}


def _bits(run: Location) -> dict[str, str]:
    """Digests of weights and labels."""
    found = {}
    for name in ("encoder/encoder.safetensors", "classifier/classifier.safetensors"):
        found[name] = hashlib.sha256(run.read_bytes(name)).hexdigest()
    for number in (1, 2):
        heads = load_round(run.uri_of("rounds"), number).heads
        labels = b"".join(head.labels_N.tobytes() for head in heads)
        found[f"round {number}"] = hashlib.sha256(labels).hexdigest()
    assert len(set(found.values())) == len(found)
    results = json.loads(run.read_bytes("results.json"))
    # The rest of `pretraining` tells of times, and which attempt it was.
    found["loss"] = str(results["pretraining"]["loss"])
    return found | {name: str(results[name]) for name in ("top1", "probe")}
