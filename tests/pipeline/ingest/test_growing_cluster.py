"""An ingest on a cluster that grows: it starts with what is there, and uses nodes as they come."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.stores import contents

ROOT = Path(__file__).resolve().parents[3]
DRIVER = """
import sys
import ray
from ray.cluster_utils import Cluster
from pipeline.config import FeatureSpec, IngestConfig
from pipeline.ingest.run import ingest
from support.decoders import decoding_by

if __name__ == "__main__":
    csv, videos, store, spec = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    added = []

    def grow(progress):
        if progress.done and not added:
            added.append(cluster.add_node(num_cpus=2))

    ingest(
        csv, videos, store, FeatureSpec.model_validate_json(spec),
        decoding_by(
            IngestConfig(local_clips=0, shard_clips=2), "tests.pipeline.slow_decoder:extract"
        ),
        start_ray=lambda: ray.init(address=cluster.address, log_to_driver=False),
        on_progress=grow,
    )
    assert added
    print(len(added), "node came", flush=True)
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_decoders_start_on_nodes_that_come_while_clips_are_decoded(
    source, undisturbed, tmp_path: Path
) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "decoders").mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"RAY_AUTH_TOKEN": "5e" * 32, "TEST_SLOW_S": "1"}
    env |= {"TEST_DECODERS": str(tmp_path / "decoders"), "PYTHONPATH": os.pathsep.join(sys.path)}
    store = f"{source.store}-again"
    command = [sys.executable, str(tmp_path / "driver.py"), str(source.csv), str(source.videos)]
    command += [store, source.spec.model_dump_json()]
    # Short: Ray's socket paths are limited; its own: this cluster must not be joined by others.
    with tempfile.TemporaryDirectory(prefix="dg", dir="/tmp", ignore_cleanup_errors=True) as ray:
        done = subprocess.run(
            command, env=env | {"RAY_TMPDIR": ray}, capture_output=True, text=True, cwd=ROOT
        )
    assert "1 node came" in done.stdout, done.stderr[-3000:]
    assert len(list((tmp_path / "decoders").iterdir())) >= 2, "one actor had to do it all"
    assert contents(store) == undisturbed
