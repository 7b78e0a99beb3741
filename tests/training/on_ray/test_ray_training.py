"""Pretraining over Ray Train: workers that die are replaced, and nothing changes."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.processes import kill
from support.ranks import run_ranks
from support.stores import noise_store

from clustering.rounds.local import LocalRounds
from clustering.rounds.protocol import PublishedRound
from pipeline.config import FeatureSpec
from pipeline.storage import Location
from training.attempt import UNHELD
from training.config import STREAMS, TrainingConfig
from training.data.order import BatchPlan, WindowPlan, lanes_of
from training.data.reader import LocalReader
from training.errors import WeightsError
from training.loop.hooks import Hooks, World
from training.loop.pretrainer import Pretrainer
from training.model.make import make_encoder
from training.on_ray import checkpoints
from training.on_ray.checkpoints import report_state
from training.on_ray.fit import fit, interruptible, this_world
from training.on_ray.pretrain import pretrain
from training.run.checkpoints import state_in
from training.run.edge import Written
from training.run.pinned import check, pin

SPEC = FeatureSpec(n_frames=2, frame_size=32, fbank_frames=32, n_mels=16, duration_s=1.0)
CONFIG = TrainingConfig.model_validate(
    {
        "encoder": {"preset": "tiny", "dim": 32, "projection": 16},
        "data": {"lanes": 3, "shuffle_window": 8, "fbank_mean": 0.0, "fbank_std": 1.0},
        "loss": {"temperature": 0.1, "intra": 1.0, "intra_epochs": 1},
        "rounds": {"warmup_epochs": 1, "margin_nats": -9.0, "lead_steps": 2},
        "pretrain": {"epochs": 4, "batch_size": 18, "checkpoint_every": 2, "log_every": 1},
        "confusion": {"update_steps": 3},
        "scale": {"num_workers": 2, "cpus_per_worker": 0.3, "reader_cpus": 0.1},
        "clustering": {
            "k": 4,
            # Noise lies close together, which a real run would be stopped for.
            "guard": {"max_mean_cosine": 1.0, "min_effective_frac": 0.0, "max_churn": 1.0},
        },
        "pool": {"n_actors": 2, "cpus_per_actor": 0.2, "cpus_per_bank": 0.1},
    }
)
N_CLIPS = 90
STEPS = 4 * (N_CLIPS // 18)
ELASTIC = """
import subprocess, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from test_ray_training import CONFIG, _written
from training.on_ray.pretrain import pretrain
from training.run.pinned import check, pin

def wait_for(what, is_there, timeout_s=180):
    deadline = time.monotonic() + timeout_s
    while not is_there():
        if time.monotonic() > deadline:
            raise SystemExit(f"no {what}")
        time.sleep(0.2)

def wait_for_workers(n, out):
    path = out / "metrics.jsonl"
    line = f'"world_size": {n}'
    wait_for(line, lambda: path.exists() and line in "".join(path.read_text().splitlines()[-1:]))

def come_and_go(cluster, node, out):
    wait_for_workers(2, out)
    if not NOTICE_S:
        wait_for("checkpoint", lambda: any((out / "pretrain").glob("checkpoint_*/state.pt")))
    time.sleep(1)  # Ray Train has to hear of it.
    if NOTICE_S:
        drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        drain += ["--address", cluster.address, "--node-id", node.node_id]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([*drain, "--deadline-remaining-seconds", str(NOTICE_S)], check=True)
        time.sleep(NOTICE_S)
    cluster.remove_node(node, allow_graceful=False)
    wait_for_workers(1, out)
    if not NOTICE_S:
        cluster.add_node(num_cpus=2)

if __name__ == "__main__":
    store, out, NOTICE_S = sys.argv[1], Path(sys.argv[2]), int(sys.argv[5])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    mine = ray.get_runtime_context().get_node_id()  # Any of them: Ray takes one of this machine.
    node = next(node for node in nodes if node.node_id != mine)
    scale = {"num_workers": 2, "min_workers": 1, "cpus_per_worker": 1.5, "reader_cpus": 0.1}
    plain = CONFIG.model_dump() | {"scale": scale}
    plain["pretrain"] |= {"epochs": int(sys.argv[3]), "checkpoint_every": int(sys.argv[4])}
    if plain["pretrain"]["epochs"] == 1:
        plain["rounds"]["labels"] = "none"  # They would come after its end, which is refused.
    config = type(CONFIG).model_validate(plain)
    data = pin(store, None, config)
    check(config, data)
    settings = (config, data, _written(out))
    training = threading.Thread(target=pretrain, args=settings)
    training.start()
    come_and_go(cluster, node, out)  # Ray starts nodes in the main thread only.
    training.join()
"""
TIMES = ("time", "clips_per_s", "clustering/seconds")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(noise_store(tmp_path_factory.mktemp("noise") / "store", SPEC, N_CLIPS).uri)


def _written(out: Path) -> Written:
    return Written(Location(out), {}, UNHELD)


def _pretrain(store: str, out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The weights and the metrics of a run of two workers that share three lanes."""
    data = pin(store, None, CONFIG)
    check(CONFIG, data)
    pretrain(CONFIG, data, _written(out))
    lines = (out / "metrics.jsonl").read_text().splitlines()
    weights = load_file(out / "encoder" / "encoder.safetensors")
    return weights, [json.loads(line) for line in lines]


class OneBank(LocalRounds):
    """Rounds of two ranks in rank 0: what the pool's actors do, without them."""

    def push(self, keys_B: np.ndarray, features_BW: np.ndarray, step: int) -> None:
        pushed: list[Any] = [None, None]
        dist.all_gather_object(pushed, (keys_B, features_BW))
        for keys, features in pushed:
            super().push(keys, features, step)

    def wait(self, round: int, timeout_s: float) -> PublishedRound:
        found = [super().wait(round, timeout_s) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found)
        return found[0]


def _plain_ranks(store: str, folder: Path, rank: int, size: int) -> tuple[Any, Any]:
    """The same run without Ray, its controller, its checkpoints or the pool."""
    index = pin(store, None, CONFIG).train
    metrics: list[dict[str, Any]] = []
    hooks = Hooks(lambda step, m: metrics.append({"step": step, **m}), lambda _: None, str)
    plan = BatchPlan.of(len(index), CONFIG.pretrain.batch_size, CONFIG.data)
    windows = WindowPlan(index, plan, lanes_of(rank, size, plan.lanes), CONFIG.seed)
    widths = dict.fromkeys(STREAMS, CONFIG.encoder.projection)
    rounds = OneBank(CONFIG.clustering, widths, str(folder / f"rounds-{rank}"), CONFIG.seed)
    encoder = make_encoder(CONFIG, index.spec)
    reader = LocalReader(windows)
    world = World(rank, size)
    Pretrainer(CONFIG, encoder, index, reader=reader, rounds=rounds, world=world, hooks=hooks).run()
    return dict(encoder.state_dict()), metrics


def _kill_a_worker(out: Path, killed: threading.Event) -> None:
    """SIGKILL one of the training workers once steps are taken and a checkpoint is written."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and not killed.is_set():
        time.sleep(0.02)
        if any((out / "pretrain").glob("checkpoint_*/state.pt")) and kill("RayTrainWorker", 1):
            killed.set()


def test_an_interrupt_ends_the_wait_and_not_only_the_training() -> None:
    """Ray Train takes SIGINT over where it can, in the main thread, and exits with 1."""
    begun, let_go = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def training() -> None:
        threads.append(threading.current_thread())
        begun.set()
        let_go.wait(10)

    def interrupt() -> None:
        begun.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        interruptible(training)
    assert threads[0] is not threading.main_thread()
    assert threads[0].daemon
    let_go.set()


@pytest.mark.slow
def test_a_worker_that_dies_costs_no_bit_of_the_result(
    ray_session: None, store: str, tmp_path: Path
) -> None:
    weights, metrics = run_ranks(2, functools.partial(_plain_ranks, store, tmp_path))[0]
    killed = threading.Event()
    out = tmp_path / "disturbed"
    # As a worker leaves it that is killed between its upload and the report of it.
    uncounted = out / "pretrain" / "checkpoint_1999-12-31_23-59-59.000000"
    uncounted.mkdir(parents=True)
    killer = threading.Thread(target=_kill_a_worker, args=(out, killed), daemon=True)
    killer.start()
    again, resumed = _pretrain(store, out)
    killer.join()
    assert killed.is_set(), "no worker was there to be killed"
    assert not uncounted.exists()
    assert len(list((out / "pretrain").glob("checkpoint_*/state.pt"))) == 2
    assert (out / "pretrain" / "checkpoint_manager_snapshot.json").exists(), "Ray's list of them"
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert any("clustering/inertia" in line for line in metrics)
    for a, b in zip(metrics, resumed, strict=True):
        same = {name for name in a if not name.startswith(TIMES)}
        assert {name: a[name] for name in same} == {name: b[name] for name in same}
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def _one_rank_fails(settings: dict[str, Any], written: Written) -> None:
    """Rank 1 has no file that the others have; they wait for it in a collective."""
    if this_world(CONFIG.scale).rank == 1:
        raise WeightsError("/nowhere/encoder cannot be read")
    dist.barrier()


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_of_them(ray_session: None, tmp_path: Path) -> None:
    started = time.monotonic()
    # Ray has a cloudpickle of its own; its workers do not find the modules of tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(WeightsError, match="/nowhere/encoder cannot be read"):
        fit(_one_rank_fails, {}, _written(tmp_path), "pretrain", CONFIG.scale)
    assert time.monotonic() - started < 100, "waited for the collective's own timeout"


def _trains_beside_its_checkpoint(settings: dict[str, Any], written: Written) -> None:
    """Storage takes the first checkpoint once training has gone on from it; then rank 0 fails."""
    rank, out = this_world(CONFIG.scale).rank, written.out
    write = checkpoints.write_state

    def late(*arguments: Any) -> None:
        while not out.exists("went-on"):
            time.sleep(0.05)
        write(*arguments)

    checkpoints.write_state = late
    state = {"step": 1, "weight": torch.zeros(4), "optimizer": {"state": [torch.zeros(4)]}}
    for step in (1, 2):
        report_state({**state, "step": step}, rank, out.below("pretrain"))
        state["weight"] += 1
        state["optimizer"]["state"][0] += 1
        out.write_bytes("went-on", b"")
    if rank == 0:
        raise WeightsError("the step after")
    dist.barrier()


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written_and_its_failure_leaves_it(
    ray_session: None, tmp_path: Path
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    once = CONFIG.scale.model_copy(update={"max_failures": 0})
    with pytest.raises(WeightsError, match="the step after"):
        fit(_trains_beside_its_checkpoint, {}, _written(tmp_path), "pretrain", once)
    found = sorted((tmp_path / "pretrain").glob("checkpoint_*/*"))
    assert [path.name for path in found] == ["state.pt"] * 2
    for step, path in enumerate(found, 1):
        state = state_in(path.parent)
        assert state["step"] == step
        assert state["weight"].tolist() == [step - 1] * 4, "later steps are in it"
        assert state["optimizer"]["state"][0].tolist() == [step - 1] * 4


def _elastic(store: str, folder: Path, *arguments: int) -> list[dict[str, Any]]:
    """The metrics of a run on a head and two nodes: one goes, and without notice another comes."""
    script = folder / "elastic.py"
    script.write_text(ELASTIC)
    folders = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, script, store, folder / "out", *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(folders),
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        },
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in metrics]


def _sizes(metrics: list[dict[str, Any]]) -> list[float]:
    return [size for size, _ in itertools.groupby(line["world_size"] for line in metrics)]


@pytest.mark.cluster
def test_a_lost_node_shrinks_training_and_a_new_one_lets_it_grow(
    store: str, tmp_path: Path
) -> None:
    """Ray looks for room to grow once a minute."""
    epochs = 180
    metrics = _elastic(store, tmp_path, epochs, 10, 0)
    assert [line["step"] for line in metrics] == list(range(1, epochs * N_CLIPS // 18 + 1))
    assert _sizes(metrics) == [2, 1, 2]


@pytest.mark.cluster
def test_a_node_that_is_announced_to_go_leaves_a_checkpoint_of_that_moment(tmp_path: Path) -> None:
    """A real notice of preemption, 10 s ahead, in an epoch that writes no other checkpoint."""
    n_steps = 900
    store = noise_store(tmp_path / "store", SPEC, n_steps * 18)
    metrics = _elastic(str(store.uri), tmp_path, 1, 10 * n_steps, 10)
    assert [line["step"] for line in metrics] == list(range(1, n_steps + 1))
    assert _sizes(metrics) == [2, 1]
