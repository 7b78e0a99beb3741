"""Whole jobs on pods in a box: what a cluster does to them must not show in what they leave."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import pytest
import yaml
from support.box.box import Box, images, until
from support.box.job import RayCluster, RayJob
from support.box.kills import Cut, Kill, Kills, head, of_group, writer
from support.box.node import why_not
from support.box.pod import ROOT
from support.box.smallest import (
    INGEST,
    SECRETS,
    SMOKE,
    STORE,
    TOKEN,
    config,
    digests,
    get,
    group,
    put,
)
from support.stores import contents

from deploy.config import ClusterConfig
from deploy.render import render
from pipeline.synth import write_clips

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

N_TRAIN = 24
READY_S = 300
SHARDS = ("--ingest.shard-clips", "4")
PRETRAIN = (
    *("pretrain", "--config", SMOKE, "--store", STORE),
    *("--scale.num-workers", "2", "--scale.threads-per-worker", "1", "--pretrain.batch-size", "8"),
    # Three steps an epoch: every other checkpoint is in the middle of one.
    *("--pretrain.epochs", "8", "--pretrain.checkpoint-every", "2"),
    *("--pretrain.log-every", "1", "--rounds.lead-steps", "1"),
)


APART, TOGETHER = (("--scale.cpus-per-worker", cpus) for cpus in ("5", "3"))
"""Training pods have 6 CPUs, the decode pod 4."""


def two_training_pods(*command: str, **fields: object) -> ClusterConfig:
    return config(*command, train=group(6, 2), retries=1, **fields)


def entrypoint(command: Sequence[str]) -> str:
    """As the manifest that is rendered for the command has it."""
    job = yaml.safe_load(render(two_training_pods(*command))["rayjob.yaml"])
    return str(job["spec"]["entrypoint"])


def pretrain_into(name: str, *more: str, where: tuple[str, ...] = APART) -> str:
    return entrypoint((*PRETRAIN, *where, "--out", f"s3://bucket/{name}", *more))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("box") / "clips"
    write_clips(folder, N_TRAIN, 8, seed=0)
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
    began = time.monotonic()
    cluster = job.start_cluster("shared", READY_S)
    print(f"\npods ready after {time.monotonic() - began:.0f} s", flush=True)
    return cluster


def succeed(job: RayJob, cluster: RayCluster, name: str, command: str, **options: object) -> str:
    began = time.monotonic()
    status, log = job.submit(cluster, name, entrypoint=command, **options)
    assert status == "SUCCEEDED", log
    print(f"\n{name}: {time.monotonic() - began:.0f} s", flush=True)
    return log


@pytest.fixture(scope="module")
def store(job: RayJob, cluster: RayCluster) -> str:
    succeed(job, cluster, "ingest", entrypoint((*INGEST, *SHARDS)))
    return STORE


def made(box: Box, name: str) -> dict[str, str]:
    """Digests of what a run is for: weights, and the labels of every round."""
    wanted = ("encoder.safetensors", "labels.parquet", "prototypes.npz")
    return {n: d for n, d in digests(box, name).items() if n.endswith(wanted)}


@pytest.fixture(scope="module")
def undisturbed(box: Box, job: RayJob, cluster: RayCluster, store: str) -> dict[str, str]:
    """What pretraining leaves that nothing happens to."""
    succeed(job, cluster, "undisturbed", pretrain_into("undisturbed"))
    return made(box, "undisturbed")


def test_training_with_clustering_runs_on_pods_that_share_nothing(
    undisturbed: dict[str, str],
) -> None:
    """Also: the pool's actors leave the training pods to the workers. Before they did, one of them
    took a tenth of a CPU there, and a worker waited for ever."""
    assert "encoder/encoder.safetensors" in undisturbed
    assert len([name for name in undisturbed if name.endswith("labels.parquet")]) == 7


def learned(box: Box, name: str, here: Path) -> tuple[set[str], list[dict[str, float]]]:
    """In which pods a run trained, by its logs, and every loss of every step."""
    run = here / name
    get(box, name, run)
    heads = {log.read_text().splitlines()[0] for log in run.glob("logs/attempt-1/train-*-worker-*")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = ("step", "loss", "train_knn")
    losses = [{n: v for n, v in line.items() if n.startswith(wanted)} for line in lines]
    return {head.split(":")[0] for head in heads}, losses


def test_two_workers_in_one_pod_and_in_two_learn_the_same_bits(
    box: Box, job: RayJob, cluster: RayCluster, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    succeed(job, cluster, "one-pod", pretrain_into("one-pod", where=TOGETHER))
    pods, losses = learned(box, "undisturbed", tmp_path)
    pod, same = learned(box, "one-pod", tmp_path)
    assert (len(pods), len(pod)) == (2, 1)
    assert losses == same
    assert made(box, "one-pod") == undisturbed


STAGES = (("finetune", "--finetune.batch-size", "8"), ("evaluate",), ("report",))


def applied(box: Box, name: str) -> dict[str, str]:
    """Digests of what the later stages make of an encoder; a model's README has the run's name."""
    wanted = ("classifier.safetensors", "measured.json", "predictions.parquet", ".npz")
    found = digests(box, name).items()
    return {
        n: d
        for n, d in found
        if n.startswith(("classifier/", "evaluation/")) and n.endswith(wanted)
    }


@pytest.fixture(scope="module")
def finished(
    box: Box, job: RayJob, cluster: RayCluster, undisturbed: dict[str, str]
) -> dict[str, str]:
    """What the stages after it leave, each by the entrypoint of its rendered job."""
    for command in STAGES:
        out = ("--out", "s3://bucket/undisturbed")
        succeed(job, cluster, command[0], entrypoint((*command, *out)))
    return applied(box, "undisturbed")


def test_every_stage_runs_by_the_manifests_entrypoint(box: Box, finished: dict[str, str]) -> None:
    assert "classifier/classifier.safetensors" in finished
    assert "evaluation/predictions.parquet" in finished
    assert {"results.json", "report.html"} <= digests(box, "undisturbed").keys()


def test_submitted_to_the_cluster_every_stage_makes_the_same(
    box: Box, cluster: RayCluster, undisturbed: dict[str, str], finished: dict[str, str]
) -> None:
    """Through what `kubectl port-forward` does: a connection from within the head's pod."""
    began = time.monotonic()
    for command in ((*PRETRAIN, *APART), *STAGES):
        line = [*command, "--out", "s3://bucket/submitted"]
        submit = ["submit", "--address", "http://127.0.0.1:8265", "--working-dir", str(ROOT)]
        keys = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        words = [sys.executable, "-m", "diccae", *submit, "--", *line]
        done = box.outside(words, cluster.head.machine, 500, **keys)
        assert done.returncode == 0, done.stdout + done.stderr
    print(f"\nsubmitted: {time.monotonic() - began:.0f} s", flush=True)
    assert made(box, "submitted") == undisturbed
    assert applied(box, "submitted") == finished
    assert "report.html" in digests(box, "submitted")


KILLS = {
    "training": [
        Kill("rounds/bank-00000008/", of_group("train-gpu")),
        Kill("rounds/bank-00000014/", of_group("train-gpu")),
    ],
    "clustering": [
        Kill("round-0002/vectors/", of_group("decode-cpu")),  # freeze
        Kill("-bank-0/segment", of_group("decode-cpu")),  # push
        Kill("round-0004/state/", of_group("decode-cpu")),  # iteration
        Kill("round-0006/labels.parquet", of_group("decode-cpu")),  # labelling
    ],
}


@pytest.mark.parametrize("who", KILLS)
def test_killed_pods_change_no_bit_of_a_run(
    who: str, box: Box, job: RayJob, cluster: RayCluster, undisturbed: dict[str, str]
) -> None:
    kills = Kills(box, KILLS[who], f"killed-{who}/pretrain/checkpoint_")
    log = succeed(job, cluster, who, pretrain_into(f"killed-{who}"), watch=kills)
    assert len(kills.lost_s) == len(KILLS[who]), log
    assert made(box, f"killed-{who}") == undisturbed


def test_another_seed_shows_in_what_is_compared(
    box: Box, job: RayJob, cluster: RayCluster, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    succeed(job, cluster, "other", pretrain_into("other", "--seed", "1"))
    found = made(box, "other")
    assert found.keys() == undisturbed.keys()
    assert not [name for name in found if found[name] == undisturbed[name]]
    (_, losses), (_, others) = (learned(box, n, tmp_path) for n in ("undisturbed", "other"))
    assert not [one for one, other in zip(losses, others, strict=True) if one == other]


def test_a_pod_that_dies_while_it_decodes_changes_no_feature(
    box: Box, job: RayJob, cluster: RayCluster, store: str, tmp_path: Path
) -> None:
    kills = Kills(
        box, [Kill("/killed-store/features/", of_group("decode-cpu"))], "killed-store/features/"
    )
    command = entrypoint([w.replace("/store", "/killed-store") for w in (*INGEST, *SHARDS)])
    succeed(job, cluster, "ingest-killed", command, watch=kills)
    assert len(kills.lost_s) == 1
    for name in ("store", "killed-store"):
        get(box, name, tmp_path / name)
    assert contents(str(tmp_path / "killed-store")) == contents(str(tmp_path / "store"))


def test_a_training_pod_that_was_cut_off_and_came_back_changes_no_bit(
    box: Box, job: RayJob, cluster: RayCluster, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """In the middle of a checkpoint, until the run goes on without it on another pod: each side has
    taken the other for dead."""
    (train,) = [g for g in cluster.spec["workerGroupSpecs"] if g["groupName"] == "train-gpu"]
    cluster.add_worker(train)  # A spare one, which may be the one that is cut off.
    until(lambda: cluster.state(), cluster.is_ready, READY_S)
    progress = "cut/pretrain/checkpoint_2"  # Its year; Ray's list of them begins like them.
    cut = Cut(box, progress, writer, after="cut/rounds/bank-00000008/", sign=progress)
    log = succeed(job, cluster, "cut", pretrain_into("cut"), watch=cut)
    pod = cut.pod
    assert pod is not None, log
    assert cut.cut_s is not None, log
    ray = pod.containers["ray-worker"]
    # TCP asks ever more rarely whether anybody is there again.
    until(ray.tail, lambda: ray.exit_code is not None, 200)
    wrote = cut.written_since_by({pod.machine.address})
    late = [name for name in wrote if "/logs/" not in name]
    assert made(box, "cut") == undisturbed
    assert learned(box, "cut", tmp_path)[1] == learned(box, "undisturbed", tmp_path)[1]
    # Only the checkpoint it was in the middle of may still come, whole, and then it does not count.
    assert len(set(late)) <= 1
    assert not [name for name in late if not name.startswith(f"/bucket/{progress}")]
    counted = (tmp_path / "cut/pretrain/checkpoint_manager_snapshot.json").read_text()
    assert "checkpoint_2" in counted
    assert not [name for name in late if PurePosixPath(name).parent.name in counted]
    cluster.remove_worker(of_group("train-gpu")(cluster))


def test_an_attempt_that_was_cut_off_and_came_back_writes_nothing_any_more(
    box: Box, job: RayJob, cluster: RayCluster, undisturbed: dict[str, str]
) -> None:
    """Its head, until the attempt after it has taken the run over; the other pods go on."""
    cut = Cut(
        box,
        "cut-head/pretrain/checkpoint_2",
        head,
        after="cut-head/rounds/bank-00000008/",
        sign="cut-head/lease/00000002",
    )
    command = pretrain_into("cut-head")
    ended: list[tuple[str, str]] = []

    def and_start_another(cluster: RayCluster, log: str) -> None:
        cut(cluster, log)
        if cut.pod is not None and not ended:
            another = job.start_cluster("another", READY_S)
            ended.append(job.submit(another, "another", cut, entrypoint=command))
            another.delete()

    began = time.monotonic()
    addresses = {pod.machine.address for pod in [cluster.head, *cluster.workers]}
    status, log = job.submit(cluster, "cut-head", and_start_another, 900, command)
    print(f"\ncut-head: {time.monotonic() - began:.0f} s", flush=True)
    addresses |= {pod.machine.address for pod in cluster.workers}
    ((status_2, log_2),) = ended
    assert status_2 == "SUCCEEDED", log_2
    assert status == "FAILED", log
    assert "lost its lease" in log
    late = [name for name in cut.written_since_by(addresses) if "/logs/attempt-1/" not in name]
    assert set(late) <= {"/bucket/cut-head/lease/00000001.json"}
    assert made(box, "cut-head") == undisturbed


def test_the_next_attempt_goes_on_where_a_killed_head_left_the_run(
    box: Box, job: RayJob, cluster: RayCluster, undisturbed: dict[str, str]
) -> None:
    """The last one: the shared cluster dies of it."""
    progress = "killed-head/pretrain/checkpoint_"
    kills = Kills(box, [Kill("rounds/bank-00000008/", head)], progress)
    ended = job.run(kills, READY_S, entrypoint=pretrain_into("killed-head"), first=cluster)
    assert len(kills.lost_s) == 1
    assert ended.status == "SUCCEEDED", ended.log
    assert ended.attempts == 2
    assert made(box, "killed-head") == undisturbed
