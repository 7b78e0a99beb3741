"""Whole jobs on pods in a box: what a cluster does to them must not show in what they leave."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.box.box import Box, images
from support.box.job import RayCluster, RayJob
from support.box.node import why_not
from support.box.smallest import INGEST, SECRETS, SMOKE, STORE, config, digests, group, put

from deploy.config import ClusterConfig
from deploy.render import render
from pipeline.synth import write_clips

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

OUT = "s3://bucket/run"
PRETRAIN = (
    *("pretrain", "--config", SMOKE, "--store", STORE, "--out", OUT),
    *("--scale.num-workers", "2", "--scale.cpus-per-worker", "5"),
    *("--scale.threads-per-worker", "1", "--pretrain.batch-size", "8"),
    *("--pretrain.log-every", "1", "--rounds.lead-steps", "1"),
)


def two_training_pods(*command: str, nodes: int = 2, **fields: object) -> ClusterConfig:
    """A worker asks for more CPUs than the decode pod has, so each trains in a pod of its own."""
    return config(*command, train=group(6, nodes), **fields)


def entrypoint(command: tuple[str, ...]) -> str:
    """As the manifest that is rendered for the command has it."""
    job = yaml.safe_load(render(two_training_pods(*command))["rayjob.yaml"])
    return str(job["spec"]["entrypoint"])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("box") / "clips"
    write_clips(folder, 24, 8, seed=0)
    return folder


@pytest.fixture(scope="module")
def box(clips: Path) -> Iterator[Box]:
    with Box(render(two_training_pods()), SECRETS) as box:
        box.add_storage("bucket")
        put(box, clips)
        yield box


@pytest.fixture(scope="module")
def job(box: Box) -> RayJob:
    return RayJob(box, images(config()))


@pytest.fixture(scope="module")
def cluster(job: RayJob) -> RayCluster:
    return job.start_cluster("stages", ready_s=300)


def test_training_with_clustering_runs_on_pods_that_share_nothing(
    box: Box, job: RayJob, cluster: RayCluster
) -> None:
    """Also: the pool's actors leave the training pods to the workers. Before they did, one of them
    took a tenth of a CPU there, and a worker waited for ever."""
    for command in (INGEST, PRETRAIN):
        status, log = job.submit(cluster, command[0], entrypoint=entrypoint(command))
        assert status == "SUCCEEDED", log
    files = digests(box, "run")
    wanted = {"results.json", "metrics.jsonl", "encoder/encoder.safetensors"}
    assert wanted | {"rounds/round-0001/labels.parquet"} <= set(files)
