"""Rounds over Ray actors have the bits of one process, through deaths at every moment."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from support.polling import wait_until
from support.processes import ray_env

from clustering.config import KMeansConfig, PoolConfig
from clustering.errors import BadVectors, ClusteringError, RoundTimeout
from clustering.pool.client import PoolClient
from clustering.pool.compute import RayPasses, compute_actors, stop
from clustering.pool.pool import ClusterPool
from clustering.rounds.frozen import FrozenRows
from clustering.rounds.local import LocalRounds
from clustering.rounds.maker import RoundMaker
from clustering.rounds.protocol import RoundRequest
from clustering.rounds.saved import read_saved, saved_name

pytestmark = pytest.mark.usefixtures("ray_session")

CONFIG = KMeansConfig(k=8, vshards=16, tol=0.0, init="random")
POOL = PoolConfig(cpus_per_actor=0.1, cpus_per_bank=0.1, coalesce_rows=256)


@pytest.fixture
def make_pool(streams, tmp_path: Path):
    pools = []

    def make(name: str = "pool", **options) -> ClusterPool:
        config = POOL.model_copy(update=options)
        pools.append(ClusterPool(CONFIG, config, streams, str(tmp_path / name), seed=1))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def shared_pool(ray_session, streams, tmp_path_factory):
    """One pool for the tests that do not compare bits; each takes round numbers of its own."""
    pool = ClusterPool(CONFIG, POOL, streams, str(tmp_path_factory.mktemp("shared")), seed=1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def expected(features, push_all, round_digest, streams, tmp_path_factory) -> list[str]:
    """Digests of two rounds made in one process."""
    rounds = LocalRounds(CONFIG, streams, str(tmp_path_factory.mktemp("local")), seed=1)
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
        ranks[0].start(
            RoundRequest(
                number,
                100 * number,
                100 * number + 20,
                expected_rows=1500,
                posterior_temperature=0.1,
            )
        )
        digests.append(round_digest(ranks[-1].wait(number, 120)))
    return digests


def test_a_pool_has_the_bits_of_one_process(
    make_pool, features, push_all, round_digest, expected
) -> None:
    pool = make_pool(n_actors=3, n_banks=2, reducer="tree", fan_in=2)
    clients = [pool.client() for _ in range(3)]
    assert _two_rounds(clients, features, push_all, round_digest) == expected


@pytest.mark.slow
def test_any_number_of_actors_and_any_reducer_give_the_same_bits(
    features, push_all, streams, round_digest, expected, tmp_path: Path
) -> None:
    rounds = LocalRounds(CONFIG, streams, str(tmp_path / "local"), seed=1)
    push_all(rounds, features(noise=2.0, drift=1), 100)
    request = RoundRequest(1, 100, 120, expected_rows=1500, posterior_temperature=0.1)
    rounds.start(request)
    rounds.wait(1, 60)
    frozen = FrozenRows.load(str(tmp_path / "local" / "round-0001" / "vectors"))
    actors = compute_actors(CONFIG, POOL.groups(CONFIG).compute._replace(n=5))
    try:
        for count, reducer in [
            (1, "driver"),
            (2, "tree"),
            (3, "driver"),
            (5, "tree"),
            (5, "driver"),
        ]:
            sources = [frozen.source(index, count) for index in range(count)]
            passes = RayPasses(actors[:count], sources, reducer, fan_in=2)
            maker = RoundMaker(CONFIG, streams, str(tmp_path / f"{count}-{reducer}"), seed=1)
            assert round_digest(maker.make(passes, frozen, request)) == expected[0]
    finally:
        stop(actors)


def _die_once(owner: str, function: str, marker: str, call: int):
    """A function for an actor: its process dies at the n-th call of a function, once."""

    def arm(_actor) -> None:
        import os
        import pydoc
        import signal

        place = pydoc.locate(owner)
        original = getattr(place, function)
        calls = []

        def dying(*args):
            calls.append(function)
            if len(calls) == call and not os.path.exists(marker):
                with open(marker, "w"):
                    pass
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(place, function, dying)

    return arm


# A pool loses several actors on its way through two rounds: (kind, number, where, which call).
DEATHS = {
    "push, then between writing a freeze and committing to it": [
        # A round has one call at least, as the sender puts together what waits.
        ("banks", 0, "clustering.rounds.bank.Bank", "push", 2),
        # The hold of the first round is written before; of the second there may be none to write.
        ("banks", 1, "clustering.storage", "write_json", 2),
    ],
    "acknowledgement, then freeze": [
        ("banks", 0, "clustering.storage", "write_bytes", 1),
        ("banks", 1, "clustering.rounds.bank.Bank", "freeze", 2),
    ],
    "iteration, then labelling, then checkpoint": [
        ("actors", 0, "clustering.kmeans.share.Share", "lloyd_sums", 3),
        ("actors", 1, "clustering.kmeans.share.Share", "label", 1),
        ("coordinator", 0, "clustering.storage", "write_arrays", 4),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("deaths", DEATHS)
def test_actors_killed_at_any_moment_change_no_bit(
    make_pool, features, push_all, round_digest, expected, tmp_path: Path, deaths: str
) -> None:
    pool = make_pool(n_banks=2)
    actors = {"banks": pool.banks, "actors": pool.actors, "coordinator": [pool.coordinator]}
    markers = []
    for kind, number, owner, function, call in DEATHS[deaths]:
        markers.append(tmp_path / f"{kind}-{number}")
        arm = _die_once(owner, function, str(markers[-1]), call)
        ray.get(actors[kind][number].__ray_call__.remote(arm))
    assert _two_rounds([pool.client()], features, push_all, round_digest) == expected
    assert all(marker.exists() for marker in markers)


def _fold_soon():
    def arm(actor) -> None:
        import clustering.rounds.bank

        clustering.rounds.bank._FOLD_ROWS = actor._bank._fold_above = 64

    return arm


def _freeze_late(gate: str):
    def arm(_actor) -> None:
        import os
        import time

        from clustering.pool.coordinator import Coordinator

        freeze = Coordinator._freeze

        def late(self, request):
            while not os.path.exists(gate):
                time.sleep(0.02)
            return freeze(self, request)

        Coordinator._freeze = late

    return arm


@pytest.mark.slow
def test_rows_pushed_before_a_late_freeze_do_not_reach_its_round(
    make_pool, features, push_all, round_digest, expected, tmp_path: Path
) -> None:
    pool = make_pool()
    gate = tmp_path / "gate"
    ray.get([bank.__ray_call__.remote(_fold_soon()) for bank in pool.banks])
    ray.get(pool.coordinator.__ray_call__.remote(_freeze_late(str(gate))))
    client = pool.client()
    push_all(client, features(noise=2.0, drift=1), 100, seed=1)
    client.flush(60)
    client.start(RoundRequest(1, 100, 120, expected_rows=1500, posterior_temperature=0.1))
    # Many more steps than ranks are apart, and more rows than a bank leaves unsorted.
    for step in (130, 160, 190, 220):
        push_all(client, features(noise=2.0, drift=2), step)
        client.flush(60)
    gate.touch()
    assert round_digest(client.wait(1, 60)) == expected[0]


def _die_before_the_manifest(frozen: str, gate: str):
    def arm(_actor) -> None:
        import os
        import signal
        import time

        from clustering.pool import coordinator

        def die(*_arguments):
            with open(frozen, "w"):
                pass
            while not os.path.exists(gate):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)

        coordinator.FrozenRows.commit = die

    return arm


@pytest.mark.slow
def test_a_coordinator_that_dies_between_freeze_and_manifest_freezes_the_same_rows(
    make_pool, features, push_all, round_digest, expected, tmp_path: Path
) -> None:
    pool = make_pool()
    frozen, gate = tmp_path / "frozen", tmp_path / "gate"
    ray.get([bank.__ray_call__.remote(_fold_soon()) for bank in pool.banks])
    ray.get(pool.coordinator.__ray_call__.remote(_die_before_the_manifest(str(frozen), str(gate))))
    client = pool.client()
    push_all(client, features(noise=2.0, drift=1), 100, seed=1)
    client.flush(60)
    client.start(RoundRequest(1, 100, 120, expected_rows=1500, posterior_temperature=0.1))
    while not frozen.exists():
        time.sleep(0.02)
    for step in (130, 160, 190, 220):
        push_all(client, features(noise=2.0, drift=2), step)
        client.flush(60)
    gate.touch()
    assert round_digest(client.wait(1, 60)) == expected[0]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.parquet"))


def _driver_dies(pool: ClusterPool) -> None:
    """Nobody tidies up."""
    stop([pool.coordinator, *pool.actors, *pool.banks])


@pytest.mark.slow
def test_a_checkpoint_costs_what_was_pushed_since_the_one_before(
    make_pool, features, push_all, streams, round_digest, tmp_path: Path
) -> None:
    data = features(noise=2.0, drift=1)
    undisturbed = LocalRounds(CONFIG, streams, str(tmp_path / "undisturbed"), seed=1)
    push_all(undisturbed, data, 100)
    pool = make_pool(n_banks=2)
    client = pool.client()
    push_all(client, data, 100, seed=1)
    client.flush(60)
    client.save(str(tmp_path / "pool" / "bank-0100"))
    whole = _bytes(tmp_path / "pool")
    for step in range(101, 106):
        before = _bytes(tmp_path / "pool")
        for rounds in (undisturbed, client):
            rounds.push(data.keys[:15], data.rows[:15][::-1], step)
        client.flush(60)
        client.save(str(tmp_path / "pool" / f"bank-0{step}"))
        client.forget_saved(3)
        # A hundredth of the rows; the rest is Parquet's footers.
        assert 0 < _bytes(tmp_path / "pool") - before < whole / 4
    _driver_dies(pool)
    # Other banks find every row; what the first has read stays although the states go.
    later = make_pool(n_banks=3)
    client = later.client()
    client.restore(str(tmp_path / "pool" / "bank-0105"))
    assert client.stats()[:1] == (1500,)
    assert client.stats().age_max == 5
    for step in range(106, 110):
        client.save(str(tmp_path / "pool" / f"bank-0{step}"))
        client.forget_saved(2)
    for rounds in (undisturbed, client):
        rounds.start(RoundRequest(1, 110, 120, expected_rows=1500, posterior_temperature=0.1))
    assert round_digest(client.wait(1, 60)) == round_digest(undisturbed.wait(1, 60))
    assert _bytes(tmp_path / "pool") > 2 * whole  # the frozen rows, and what states name
    client.save(str(tmp_path / "pool" / "bank-0110"))
    client.forget_saved(1)
    client.start(RoundRequest(2, 110, 120, expected_rows=1500, posterior_temperature=0.1))
    client.wait(2, 60)
    # Only frozen rows are left: of the first round, which the state names, and of the second.
    assert list((tmp_path / "pool" / "bank").rglob("*.parquet")) == []
    later.close()
    restored = LocalRounds(CONFIG, streams, str(tmp_path / "local"), seed=1)
    restored.restore(str(tmp_path / "pool" / "bank-0110"))
    assert restored.stats().rows == 1500


def test_banks_of_before_a_round_hold_nothing_back_once_it_is_published(
    make_pool, features, push_all, tmp_path: Path
) -> None:
    """What was saved says that a freeze is to come, for which each version of a row would stay."""
    pool, gate, home = make_pool(), tmp_path / "gate", tmp_path / "pool"
    ray.get(pool.coordinator.__ray_call__.remote(_freeze_late(str(gate))))
    client = pool.client()
    push_all(client, features(), 100)
    client.flush(60)
    request = RoundRequest(1, 100, 120, posterior_temperature=0.1)
    client.start(request)
    client.save(str(home / "bank-0110"))
    assert read_saved(str(home / "bank-0110")).held == 100
    gate.touch()
    client.wait(1, 60)
    client.restore(str(home / "bank-0110"))
    client.start(request)
    client.wait(1, 60)
    client.save(str(home / "bank-0120"))
    assert read_saved(str(home / "bank-0120")).held is None


def test_states_of_steps_that_were_lost_are_forgotten(
    make_pool, features, push_all, tmp_path: Path
) -> None:
    client, home = make_pool().client(), tmp_path / "pool"
    push_all(client, features(), 100)
    client.flush(60)
    for step in (99, 400, 600, 1000):
        client.save(str(home / saved_name(step)))
    client.forget_later(400)
    left = sorted(path.parent.name for path in home.glob("bank-*/manifest.json"))
    assert left == ["bank-00000099", "bank-00000400"]
    client.restore(str(home / left[1]))
    assert client.stats().rows == 1500


@pytest.mark.slow
def test_a_run_resumed_before_the_freeze_of_its_round_has_the_rows_for_it(
    make_pool, features, push_all, round_digest, expected, tmp_path: Path
) -> None:
    pool = make_pool()
    ray.get(pool.coordinator.__ray_call__.remote(_freeze_late(str(tmp_path / "never"))))
    client = pool.client()
    push_all(client, features(noise=2.0, drift=1), 100, seed=1)
    client.flush(60)
    request = RoundRequest(1, 100, 120, expected_rows=1500, posterior_temperature=0.1)
    client.start(request)
    push_all(client, features(noise=2.0, drift=2), 110)
    client.flush(60)
    client.save(str(tmp_path / "pool" / "bank-0110"))
    _driver_dies(pool)
    resumed = make_pool(n_banks=2).client()
    resumed.restore(str(tmp_path / "pool" / "bank-0110"))
    resumed.start(request)
    assert round_digest(resumed.wait(1, 60)) == expected[0]


_DRIVER = """
import pickle, sys
import ray
from clustering.pool.pool import ClusterPool
from clustering.rounds.protocol import RoundRequest

with open(sys.argv[1], "rb") as handle:
    config, pool, streams, uri, keys, rows = pickle.load(handle)
ray.init(address="auto")
pool = ClusterPool(config, pool, streams, uri, seed=1)


def slow(_actor):
    import time
    from clustering.kmeans.checkpoint import StateFile
    save = StateFile.save
    def slowly(self, state):
        save(self, state)
        time.sleep(0.3)
    StateFile.save = slowly


ray.get(pool.coordinator.__ray_call__.remote(slow))
client = pool.client()
client.push(keys, rows, 100)
client.flush(60)
client.start(RoundRequest(1, 100, 120, expected_rows=1500, posterior_temperature=0.1))
client.wait(1, 120)
"""


@pytest.mark.slow
def test_the_pool_of_a_run_that_was_taken_over_removes_nothing_at_its_end(
    features, push_all, streams, tmp_path: Path
) -> None:
    """What its banks wrote may be what the next attempt goes on with."""
    taken = tmp_path / "taken"

    def may_write() -> None:
        if taken.exists():
            raise ClusteringError("another holds the run")

    home = tmp_path / "pool"
    pool = ClusterPool(CONFIG, POOL, streams, str(home), seed=1, may_write=may_write)
    client = pool.client()
    push_all(client, features(noise=2.0, drift=1), 100)
    client.flush(60)
    client.save(str(home / "bank-0100"))
    shutil.rmtree(home / "bank-0100")  # The state: nobody names the rows now.
    taken.touch()
    before = {path for path in home.rglob("*") if path.is_file()}
    assert before
    with pytest.raises(ClusteringError, match="another holds"):
        pool.close()
    assert before <= {*home.rglob("*")}


@pytest.mark.slow
def test_a_killed_driver_is_resumed_by_the_next_one(
    make_pool, features, streams, round_digest, expected, tmp_path: Path
) -> None:
    data = features(noise=2.0, drift=1)
    uri = tmp_path / "killed"
    with open(tmp_path / "input", "wb") as handle:
        pickle.dump((CONFIG, POOL, streams, str(uri), data.keys, data.rows), handle)
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(tmp_path / "input")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**ray_env(), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    state = uri / "round-0001" / "state" / "mean.npz"
    try:
        wait_until(lambda: _iterations(state) >= 2, 90, "two iterations", driver, every_s=0.02)
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


@pytest.mark.slow
def test_a_stalled_bank_never_makes_training_wait(shared_pool, features, streams) -> None:
    config = POOL.model_copy(update={"coalesce_rows": 64, "buffer_rows": 1000})
    client = PoolClient(CONFIG.vshards, config, streams, shared_pool.banks, shared_pool.coordinator)
    data = features()
    client.push(data.keys[:64], data.rows[:64], 1)
    client.flush(60)
    pids = [ray.get(bank.__ray_call__.remote(lambda _: os.getpid())) for bank in shared_pool.banks]
    seconds = []
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for step in range(2, 102):
            started = time.perf_counter()
            client.push(data.keys[:64], data.rows[:64], step)
            seconds.append(time.perf_counter() - started)
        with pytest.raises(RoundTimeout, match=r"not yet on storage after 0\.2 s"):
            client.flush(0.2)
        # Of 6,400: 1,000 may wait, some loads are already on their way. No bank is asked.
        assert client.dropped >= 3000
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    # The machine may take the processor away from any single push: the 95th percentile counts.
    assert np.quantile(seconds, 0.95) < 0.005
    client.flush(60)
    stats = client.stats()
    assert stats.rows == 64
    assert stats.age_max == 0


def test_labels_reach_workers_in_other_processes(
    shared_pool, features, push_all, streams, tmp_path: Path
) -> None:
    data = features(noise=0.5)
    saved = LocalRounds(CONFIG, streams, str(tmp_path))
    push_all(saved, data, 5)
    saved.save(str(tmp_path / "bank-1"))
    client = shared_pool.client()
    client.restore(str(tmp_path / "bank-1"))
    assert client.stats().rows == 1500

    @ray.remote(num_cpus=0.1)
    def rank(client, number: int) -> np.ndarray:
        client.push(data.keys[number::2], data.rows[number::2], 6)
        client.flush(60)
        if number == 1:
            client.start(RoundRequest(11, 6, 9, posterior_temperature=0.1))
        [head] = client.wait(11, 60).heads
        return head.lookup(data.keys)

    labels = ray.get([rank.remote(client, number) for number in (0, 1)])
    assert np.array_equal(*labels)
    assert (labels[0] >= 0).all()


def test_errors_of_a_round_arrive_as_they_are(
    shared_pool, features, push_all, streams, tmp_path: Path
) -> None:
    client = shared_pool.client()
    with pytest.raises(RoundTimeout, match=r"round 21 is not ready after 0\.1 s"):
        client.wait(21, 0.1)
    few = LocalRounds(CONFIG, streams, str(tmp_path))
    push_all(few, features(n=7), 5)
    few.save(str(tmp_path / "bank-1"))
    client.restore(str(tmp_path / "bank-1"))
    client.start(RoundRequest(21, 5, 6, posterior_temperature=0.1))
    with pytest.raises(BadVectors, match="7 rows for k = 8 clusters"):
        client.wait(21, 60)
    with pytest.raises(ClusteringError, match="no saved bank"):
        client.restore(str(tmp_path / "nowhere"))
