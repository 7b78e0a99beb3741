"""Groups without a node grow for a job and shrink after it, by Ray's own autoscaler."""

import time
from collections.abc import Iterator

import pytest
import yaml
from support.box.autoscaled import AutoscaledCluster
from support.box.box import Box, images, until
from support.box.job import RayJob
from support.box.node import why_not
from support.box.smallest import INGEST, SECRETS, SMOKE, STORE, config, digests, group, put

from deploy.config import ClusterConfig
from deploy.render import render
from pipeline.synth import write_clips

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

READY_S = 300
IDLE_S = 20
PRETRAIN = (
    *("pretrain", "--config", SMOKE, "--store", STORE, "--out", "s3://bucket/run"),
    *("--scale.num-workers", "2", "--scale.cpus-per-worker", "5"),
    *("--scale.threads-per-worker", "1", "--pretrain.batch-size", "8", "--pretrain.epochs", "3"),
)


def from_zero(*command: str) -> ClusterConfig:
    """A head, and room for one decode and two training pods that are not there."""
    decode = group(4, 1).model_copy(update={"min_nodes": 0})
    train = group(6, 2).model_copy(update={"min_nodes": 0})
    return config(*command, decode=decode, train=train, idle_s=IDLE_S)


def entrypoint(*command: str) -> str:
    job = yaml.safe_load(render(from_zero(*command))["rayjob.yaml"])
    return str(job["spec"]["entrypoint"])


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    clips = tmp_path_factory.mktemp("autoscaled") / "clips"
    write_clips(clips, 24, 8, seed=0)
    with Box(render(from_zero()), SECRETS) as box:
        box.add_storage("bucket")
        put(box, clips)
        yield box


@pytest.fixture(scope="module")
def job(box: Box) -> RayJob:
    return RayJob(box, images(config()))


@pytest.fixture(scope="module")
def cluster(box: Box, job: RayJob) -> AutoscaledCluster:
    spec = job.spec["rayClusterSpec"]
    cluster = AutoscaledCluster(box, spec, "grows", job.namespace, images(config()))
    until(lambda: f"the head is not ready:\n{cluster.state()}", cluster.is_ready, READY_S)
    return cluster


def _run(job: RayJob, cluster: AutoscaledCluster, name: str, command: str) -> str:
    began = time.monotonic()
    status, log = job.submit(cluster, name, run_s=600, entrypoint=command)
    assert status == "SUCCEEDED", f"{log}\n{cluster.state()}"
    print(f"\n{name}: {time.monotonic() - began:.0f} s; {cluster.sizes}", flush=True)
    return log


def _until_all_are_given_back(cluster: AutoscaledCluster) -> None:
    def none_left() -> bool:
        cluster.reconcile()
        return not cluster.workers

    began = time.monotonic()
    until(lambda: f"nodes are kept:\n{cluster.state()}", none_left, IDLE_S + 120)
    print(f"\ngiven back after {time.monotonic() - began:.0f} s", flush=True)


def test_a_job_waits_while_its_groups_grow_and_nothing_stays_after_it(
    box: Box, job: RayJob, cluster: AutoscaledCluster
) -> None:
    log = _run(job, cluster, "ingest", entrypoint(*INGEST))
    assert "waiting   for the first node" in log
    _until_all_are_given_back(cluster)
    log = _run(job, cluster, "pretrain", entrypoint(*PRETRAIN))
    assert "waiting   for nodes" in log
    assert {"decode-cpu": 1, "train-gpu": 2} in [size for _, size in cluster.sizes]
    assert "encoder/encoder.safetensors" in digests(box, "run")
    _until_all_are_given_back(cluster)
