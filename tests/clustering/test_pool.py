"""Rounds over Ray actors have the bits of one process, through deaths at every moment."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from clustering.config import ClusteringConfig
from clustering.errors import BadVectors, RoundTimeout
from clustering.local import LocalRounds
from clustering.pool import ClusterPool
from clustering.rounds import RoundRequest

pytestmark = pytest.mark.usefixtures("ray_session")

SETTINGS = {
    "k": 8,
    "vshards": 16,
    "tol": 0.0,
    "init": "random",
    "cpus_per_actor": 0.1,
    "cpus_per_bank": 0.1,
    "coalesce_rows": 256,
}
CONFIG = ClusteringConfig(**SETTINGS)


@pytest.fixture
def make_pool(streams, tmp_path: Path):
    pools = []

    def make(name: str = "pool", **options) -> ClusterPool:
        config = ClusteringConfig(**{**SETTINGS, **options})
        pools.append(ClusterPool(config, streams, str(tmp_path / name), seed=1))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def expected(features, push_all, round_digest, streams, tmp_path: Path) -> list[str]:
    """Digests of two rounds made in one process."""
    rounds = LocalRounds(CONFIG, streams, str(tmp_path / "local"), seed=1)
    return _two_rounds([rounds], features, push_all, round_digest)


def _two_rounds(ranks, features, push_all, round_digest) -> list[str]:
    digests = []
    for number in (1, 2):
        for rank, rounds in enumerate(ranks):
            # Ranks overlap, as with a sampler that pads: equal rows must not count twice.
            data = features(noise=2.0, drift=number)
            data = data._replace(
                keys=data.keys[rank :: len(ranks)] if rank else data.keys,
                rows=data.rows[rank :: len(ranks)] if rank else data.rows,
            )
            push_all(rounds, data, 100 * number, seed=rank + number)
        for rounds in ranks:
            rounds.flush(60)
        ranks[0].start(RoundRequest(number, 100 * number, 100 * number + 20, expected_rows=1500))
        digests.append(round_digest(ranks[-1].wait(number, 120)))
    return digests


@pytest.mark.parametrize(
    ("n_actors", "n_banks", "reducer", "ranks"),
    [(1, 1, "driver", 1), (2, 1, "tree", 2), (3, 2, "driver", 3), (5, 3, "tree", 1)],
)
def test_any_pool_has_the_bits_of_one_process(
    make_pool, features, push_all, round_digest, expected, n_actors, n_banks, reducer, ranks
) -> None:
    pool = make_pool(n_actors=n_actors, n_banks=n_banks, reducer=reducer, fan_in=2)
    clients = [pool.client() for _ in range(ranks)]
    assert _two_rounds(clients, features, push_all, round_digest) == expected


def _die_once(owner: str, method: str, marker: str, call: int):
    """A function for an actor: its own process dies at the n-th call of a method, once."""

    def arm(_actor) -> None:
        import importlib
        import os
        import signal

        module, name = owner.rsplit(".", 1)
        cls = getattr(importlib.import_module(module), name)
        original = getattr(cls, method)
        calls = []

        def dying(self, *args):
            calls.append(method)
            if len(calls) == call and not os.path.exists(marker):
                with open(marker, "w"):
                    pass
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args)

        setattr(cls, method, dying)

    return arm


DEATHS = [
    ("banks", "clustering.bank.Bank", "push", 3),
    ("banks", "clustering.bank_actor.BankActor", "sync", 1),
    ("banks", "clustering.bank.Bank", "freeze", 1),
    ("banks", "clustering.bank_actor.BankActor", "_rebase", 2),
    ("actors", "clustering.shares.Share", "lloyd_sums", 3),
    ("actors", "clustering.shares.Share", "label", 1),
    ("actors", "clustering.shares.Share", "posterior_sums", 2),
    ("coordinator", "clustering.making.StateFile", "save", 4),
]


@pytest.mark.parametrize(("who", "owner", "method", "call"), DEATHS)
def test_an_actor_killed_at_any_moment_changes_no_bit(
    make_pool, features, push_all, round_digest, expected, tmp_path, who, owner, method, call
) -> None:
    pool = make_pool()
    marker = tmp_path / "died"
    actors = getattr(pool, who)
    victim = actors[-1] if isinstance(actors, list) else actors
    ray.get(victim.__ray_call__.remote(_die_once(owner, method, str(marker), call)))
    assert _two_rounds([pool.client()], features, push_all, round_digest) == expected
    assert marker.exists()


_DRIVER = """
import pickle, sys
import ray
from clustering.config import ClusteringConfig
from clustering.pool import ClusterPool
from clustering.rounds import RoundRequest

with open(sys.argv[1], "rb") as handle:
    settings, streams, uri, keys, rows = pickle.load(handle)
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=150 * 2**20)
pool = ClusterPool(ClusteringConfig(**settings), streams, uri, seed=1)


def slow(_actor):
    import time
    from clustering.making import StateFile
    save = StateFile.save
    def slowly(self, arrays):
        save(self, arrays)
        time.sleep(0.3)
    StateFile.save = slowly


ray.get(pool.coordinator.__ray_call__.remote(slow))
client = pool.client()
client.push(keys, rows, 100)
client.flush(60)
client.start(RoundRequest(1, 100, 120, expected_rows=1500))
client.wait(1, 120)
"""


def test_a_killed_driver_is_resumed_by_the_next_one(
    make_pool, features, streams, round_digest, expected, tmp_path: Path
) -> None:
    data = features(noise=2.0, drift=1)
    uri = tmp_path / "killed"
    with open(tmp_path / "input", "wb") as handle:
        pickle.dump((SETTINGS, streams, str(uri), data.keys, data.rows), handle)
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(tmp_path / "input")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    state = uri / "round-0001" / "state" / "mean.npz"
    try:
        _until(lambda: driver.poll() is not None or _iterations(state) >= 2, 90)
        assert driver.poll() is None
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not (uri / "round-0001" / "round.json").exists()
    made = make_pool("killed").client().wait(1, 60)
    assert round_digest(made) == expected[0]


def _iterations(state: Path) -> int:
    try:
        with np.load(state) as arrays:
            return len(arrays["inertia"])
    except (FileNotFoundError, OSError):
        return 0


def _until(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_a_stalled_bank_never_makes_training_wait(make_pool, features) -> None:
    pool = make_pool(coalesce_rows=64, buffer_rows=1000)
    client = pool.client()
    data = features()
    client.push(data.keys[:64], data.rows[:64], 1)
    client.flush(60)
    pids = [ray.get(bank.__ray_call__.remote(lambda _: os.getpid())) for bank in pool.banks]
    seconds = []
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for step in range(2, 102):
            started = time.perf_counter()
            client.push(data.keys[:64], data.rows[:64], step)
            seconds.append(time.perf_counter() - started)
        with pytest.raises(RoundTimeout, match="not yet on storage after 0.2 s"):
            client.flush(0.2)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    # The machine may take the processor away from any single push: the 95th percentile counts.
    assert np.quantile(seconds, 0.95) < 0.005
    client.flush(60)
    stats = client.stats()
    assert stats.dropped >= 5000
    assert stats.rows == 64
    assert stats.age_max == 0


def test_labels_reach_workers_in_other_processes(make_pool, features, push_all, streams) -> None:
    pool = make_pool()
    data = features(noise=0.5)

    @ray.remote(num_cpus=0.1)
    def rank(client, number: int) -> np.ndarray:
        client.push(data.keys[number::2], data.rows[number::2], 5)
        client.flush(60)
        if number == 1:
            client.start(RoundRequest(1, 5, 9))
        [head] = client.wait(1, 60).heads
        return head.lookup(data.keys)

    client = pool.client()
    # The last rank starts the round, so that the first one already waits for it; it must have
    # flushed by then, as a barrier makes sure in training.
    client.push(data.keys[::2], data.rows[::2], 5)
    client.flush(60)
    labels = ray.get([rank.remote(client, number) for number in (0, 1)])
    assert np.array_equal(*labels)
    assert (labels[0] >= 0).all()


def test_errors_of_a_round_arrive_as_they_are(make_pool, features, push_all) -> None:
    client = make_pool().client()
    with pytest.raises(RoundTimeout, match="round 1 is not ready after 0.1 s"):
        client.wait(1, 0.1)
    push_all(client, features(n=7), 1)
    client.flush(60)
    client.start(RoundRequest(1, 1, 2))
    with pytest.raises(BadVectors, match="7 rows for k = 8 clusters"):
        client.wait(1, 60)


def test_a_saved_pool_is_restored_into_another(
    make_pool, features, push_all, round_digest, expected, tmp_path: Path
) -> None:
    first = make_pool("first", n_banks=2).client()
    push_all(first, features(noise=2.0, drift=1), 100)
    first.flush(60)
    first.save(str(tmp_path / "checkpoint"))
    second = make_pool("second", n_banks=1).client()
    second.restore(str(tmp_path / "checkpoint"))
    second.start(RoundRequest(1, 100, 120, expected_rows=1500))
    assert round_digest(second.wait(1, 60)) == expected[0]
