"""Pretraining over Ray Train: workers that die are replaced, and nothing changes."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.processes import kill
from support.stores import noise_store

from clustering.config import ClusteringConfig
from pipeline.config import FeatureSpec
from training.config import TrainingConfig
from training.metrics_copier import RunHandle
from training.pretrain import check, pin, pretrain
from training.ray_fit import interruptible

SPEC = FeatureSpec(n_frames=2, frame_size=32, fbank_frames=32, n_mels=16, duration_s=1.0)
CONFIG = TrainingConfig.model_validate(
    {
        "encoder": {"preset": "tiny", "dim": 32, "projection": 16},
        "data": {"lanes": 3, "shuffle_window": 8},
        "loss": {"temperature": 0.1, "intra": 1.0, "intra_epochs": 1},
        "rounds": {"warmup_epochs": 1, "margin_nats": -9.0, "lead_steps": 2},
        "pretrain": {"epochs": 4, "batch_size": 18, "checkpoint_every": 2, "log_every": 1},
        "confusion": {"update_steps": 3},
        "scale": {"num_workers": 2, "cpus_per_worker": 0.3, "reader_cpus": 0.1},
    }
)
CLUSTERING = ClusteringConfig.model_validate(
    {
        "k": 4,
        "n_actors": 2,
        "cpus_per_actor": 0.2,
        "cpus_per_bank": 0.1,
        # Noise lies close together, which a real run would be stopped for.
        "guard": {"max_mean_cosine": 1.0, "min_effective_frac": 0.0, "max_churn": 1.0},
    }
)
N_CLIPS = 90
STEPS = 4 * (N_CLIPS // 18)
TIMES = ("time", "clips_per_s", "clustering/seconds")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(noise_store(tmp_path_factory.mktemp("noise") / "store", SPEC, N_CLIPS).uri)


def _pretrain(store: str, out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The weights and the metrics of a run of two workers that share three lanes."""
    data = pin(store, None, CONFIG)
    check(CONFIG, CLUSTERING, data)
    pretrain(CONFIG, CLUSTERING, data, out, RunHandle("", "", str(out)), {})
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return (out / "encoder" / "encoder.safetensors").read_bytes(), [json.loads(x) for x in lines]


def _kill_a_worker(out: Path, killed: threading.Event) -> None:
    """SIGKILL one of the training workers once steps are taken and a checkpoint is written."""
    deadline = time.monotonic() + 120
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


def test_a_worker_that_dies_costs_no_bit_of_the_result(
    ray_session: None, store: str, tmp_path: Path
) -> None:
    weights, metrics = _pretrain(store, tmp_path / "undisturbed")
    killed = threading.Event()
    out = tmp_path / "disturbed"
    killer = threading.Thread(target=_kill_a_worker, args=(out, killed), daemon=True)
    killer.start()
    again, resumed = _pretrain(store, out)
    killer.join()
    assert killed.is_set(), "no worker was there to be killed"
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert any("clustering/inertia" in line for line in metrics)
    for a, b in zip(metrics, resumed, strict=True):
        same = {name for name in a if not name.startswith(TIMES)}
        assert {name: a[name] for name in same} == {name: b[name] for name in same}
    assert again == weights
