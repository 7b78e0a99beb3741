"""A run on two nodes: what its processes said outlives them, and both are measured in one run."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from mlflow import MlflowClient

from diccae.cli import main
from training.cluster_config import TrackingConfig
from training.tracking.mlflow_run import create_run

DRIVER = """
import os, signal, sys, time
from pathlib import Path
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster
from diccae.nodes.every_node import watched_nodes
from diccae.run_folder import RunFolder
from training.tracking.client import RunHandle

def until(what, happens):
    deadline = time.monotonic() + 240
    while not happens():
        if time.monotonic() > deadline:
            raise SystemExit(f"never {what}")
        time.sleep(0.2)

class Talker:
    def say(self, text):
        print(text, flush=True)
        return os.getpid()

if __name__ == "__main__":
    out, uri, run_id = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    folder = RunFolder(out)
    with folder.held("pretrain"), watched_nodes(
        folder.attempt, RunHandle(uri, run_id, out), True, every_s=0.5
    ):
        cluster.add_node(num_cpus=1)  # After the run began.
        # A CPU each: one on each node.
        talkers = [ray.remote(Talker).options(num_cpus=1).remote() for _ in range(2)]
        pids = ray.get([t.say.remote(f"talker {i}") for i, t in enumerate(talkers)])
        logs = Path(out) / "logs" / "attempt-1"
        until("kept", lambda: len(list(logs.glob("process-*"))) == 2)
        os.kill(pids[0], signal.SIGKILL)
        client = MlflowClient(uri)
        names = lambda: client.get_run(run_id).data.metrics
        until("measured", lambda: len({n.split("/")[1] for n in names() if "cpu_util" in n}) == 2)
        ray.get(talkers[1].say.remote("the last word, " + os.environ["A_TOKEN"]))
        print("so it ends", flush=True)
        raise RuntimeError("here")
"""


@pytest.mark.slow
def test_logs_and_measures_of_all_nodes_outlive_a_driver_that_dies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    handle = create_run(TrackingConfig(), str(out), {}, {}, {})
    (tmp_path / "driver.py").write_text(DRIVER)
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"A_TOKEN": "open-sesame", "RAY_AUTH_TOKEN": "5e" * 32}
    job = {"metadata": {"job_submission_id": "raysubmit_1"}, "runtime_env": {}}
    env["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(job)
    command = [sys.executable, str(tmp_path / "driver.py"), str(out), handle.uri, handle.run_id]
    # Short: Ray's socket paths are limited; its own: this cluster must not be joined by others.
    with (
        tempfile.TemporaryDirectory(prefix="dn", dir="/tmp", ignore_cleanup_errors=True) as ray,
        open(tmp_path / "said", "wb") as said,
    ):
        env |= {"RAY_TMPDIR": ray}
        done = subprocess.run(command, env=env, stdout=said, stderr=said, timeout=500)
    assert done.returncode == 1, (tmp_path / "said").read_text()

    assert main(["logs", "--out", str(out)]) == 0
    driver = capsys.readouterr().out
    assert "so it ends" in driver
    assert driver.splitlines()[-1] == "RuntimeError: here", "what ended it is said last"
    assert main(["logs", "--out", str(out), "--of", "process"]) == 0
    kept = capsys.readouterr().out
    assert "talker 0" in kept, "of the process that was killed"
    assert "talker 1\nthe last word, ***\n" in kept
    assert "open-sesame" not in kept + driver

    found = MlflowClient(handle.uri).get_run(handle.run_id).data.metrics
    nodes = {name.split("/")[1] for name in found if name.startswith("system/")}
    assert len(nodes) == 2
    for node in nodes:
        for measure in ("cpu_utilization_percentage", "network_receive_megabytes"):
            assert f"system/{node}/{measure}" in found
