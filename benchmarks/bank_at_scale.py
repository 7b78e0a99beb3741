"""What the feature bank bears: 200 training workers against the actors of one pool.

    python benchmarks/bank_at_scale.py [--workers 200] [--processes 4] [--seconds 40]

The pool is that of configs/vggsound.yaml; banks, compute actors and coordinator are its own. Each
worker is a `PoolClient` with its `Sender`, as a training worker holds one, on a thread; a few
processes share the threads. Workers keep step, as training does: all push 64 rows at once, and all
ask for the labels of a published round at once, which is more than they do.

The peer is one worker alone: of its rows/s, and of its waits. What 8 GPUs push at base size is the
arithmetic of docs/vggsound.md; 64 GPUs are arithmetic on what a row cost a bank. What checkpoints
cost is the question of bank_checkpoints.py.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import psutil
import ray

from clustering.config import KMeansConfig, PoolConfig
from clustering.kmeans.label_table import LabelTable
from clustering.pool.client import PoolClient
from clustering.pool.pool import ClusterPool
from clustering.rounds.given import Given
from clustering.rounds.protocol import RoundRequest

STREAMS = {"audio": 256, "video": 256, "fusion": 256}
WIDTH = sum(STREAMS.values())
ROW_BYTES = 16 + 2 * WIDTH
ROWS = 64
POOL = PoolConfig(n_actors=8, cpus_per_actor=1)
K = 600
ROWS_PER_GPU = 100e12 / (3 * 132e9)
"""A second: a third of the peak of 300 TFLOP/s, over a step of both streams of ViT-B."""
PATIENCE_S = 300.0


class Waits(NamedTuple):
    """Of some workers, in seconds."""

    pushes: list[float]
    polls: list[float]
    flushes: list[float]


class Crowd:
    """Training workers that share a process."""

    def __init__(self, client: PoolClient, keys: list[np.ndarray]) -> None:
        """Args: keys: the clips of each worker."""
        make, handles = client.__reduce__()
        self.clients = [make(*handles) for _ in keys]
        self.keys = keys
        self.rows = rows_of(ROWS)

    def fill(self) -> None:
        """Push every clip once, as fast as it goes, until all are on storage."""

        def worker(client: PoolClient, keys: np.ndarray) -> None:
            for start in range(0, len(keys), ROWS):
                part = keys[start : start + ROWS]
                client.push(part, self.rows[: len(part)], 1)
            client.flush(PATIENCE_S)

        self._at_once(worker)

    def train(self, start: float, period_s: float, steps: int) -> Waits:
        """Push and poll once in every period from the time `start` on, then flush."""
        waits, lock = Waits([], [], []), threading.Lock()

        def worker(client: PoolClient, keys: np.ndarray) -> None:
            pushes, polls = [], []
            for step in range(steps):
                time.sleep(max(0.0, start + step * period_s - time.time()))
                part = keys[step * ROWS % max(1, len(keys) - ROWS) :][:ROWS]
                pushes.append(timed(client.push, part, self.rows[: len(part)], 2 + step))
                polls.append(timed(client.wait, 1, PATIENCE_S))
            time.sleep(max(0.0, start + steps * period_s - time.time()))
            flush = timed(client.flush, PATIENCE_S)
            with lock:
                waits.pushes.extend(pushes)
                waits.polls.extend(polls)
                waits.flushes.append(flush)

        self._at_once(worker)
        return waits

    def dropped(self) -> int:
        """Rows that were given up so far."""
        return sum(client.dropped for client in self.clients)

    def _at_once(self, work: Callable[[PoolClient, np.ndarray], None]) -> None:
        errors: list[BaseException] = []

        def run(*args: Any) -> None:
            try:
                work(*args)
            except BaseException as error:
                errors.append(error)

        pairs = zip(self.clients, self.keys, strict=True)
        threads = [threading.Thread(target=run, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def rows_of(n: int) -> np.ndarray:
    """Rows of a bank: numbers of either sign between 0.5 and 1, which nobody looks at."""
    rng = np.random.default_rng(n)
    bits = rng.integers(0x3800, 0x3C00, (n, WIDTH), np.uint16)
    signed: np.ndarray = bits | rng.integers(0, 2, bits.shape, np.uint16) << 15
    return signed.view(np.float16)


def timed(call: Callable[..., Any], *args: Any) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began


def row(line: str) -> None:
    """Print a line at once: a run takes minutes."""
    print(line, flush=True)


class ActorUse(NamedTuple):
    """What one actor has taken."""

    cpu_s: float
    resident: int
    own: int
    """Without what it shares with others: libraries, and the object store's memory."""


def uses() -> dict[str, list[ActorUse]]:
    """CPU seconds so far and memory of the actors on this machine, by their class."""
    found: dict[str, list[ActorUse]] = {}
    for process in psutil.process_iter(["cmdline"]):
        title = "".join(process.info["cmdline"] or [])
        for name in ("BankActor", "ComputeActor", "Coordinator", "Crowd"):
            if title.startswith(f"ray::{name}"):
                cpu, memory = process.cpu_times(), process.memory_full_info()
                use = ActorUse(cpu.user + cpu.system, memory.rss, memory.uss)
                found.setdefault(name, []).append(use)
    return found


def bank_cpu_s() -> float:
    """CPU seconds of all banks so far."""
    return sum(use.cpu_s for use in uses()["BankActor"])


def pool_of(keys: np.ndarray, k: int, home: str) -> ClusterPool:
    """A pool that is up, with labels in place of a clustering: how long k-means takes is not the
    question here."""
    labels = LabelTable(np.sort(keys), (np.arange(len(keys)) % k).astype(np.int32))
    pool = ClusterPool(KMeansConfig(k=k), POOL, STREAMS, home, given=Given(labels))
    ray.get([actor.__ray_ready__.remote() for actor in (*pool.banks, *pool.actors)])
    return pool


def make_round(client: PoolClient, n: int) -> float:
    """Seconds until the first round, of n clips, is published."""
    began = time.perf_counter()
    client.start(RoundRequest(1, 1, 1, expected_rows=n, posterior_temperature=0.1))
    assert client.wait(1, PATIENCE_S).ok, "withheld: there are no labels to poll"
    return time.perf_counter() - began


def at_scale(options: argparse.Namespace, folder: str) -> None:
    """Workers against a pool: as fast as it goes, then at the rate of 8 GPUs."""
    keys = np.random.default_rng(0).choice(2**60, options.clips, replace=False).astype(np.uint64)
    pool = pool_of(keys, K, folder)
    client = pool.client()
    one = Crowd(client, [keys[:16_384]])
    alone = len(one.keys[0]) / timed(one.fill)
    shares = np.array_split(keys, options.workers)
    remote = ray.remote(Crowd).options(num_cpus=1)
    groups = [shares[i :: options.processes] for i in range(options.processes)]
    crowds = [remote.remote(client, group) for group in groups]
    ray.get([crowd.dropped.remote() for crowd in crowds])
    row(f"{options.workers} workers in {options.processes} processes, {options.clips:,} rows of")
    row(f"{WIDTH} values, {POOL.bank_actors} banks, {ROWS} rows a push")
    cpu, began = bank_cpu_s(), time.perf_counter()
    ray.get([crowd.fill.remote() for crowd in crowds])
    most = options.clips / (time.perf_counter() - began)
    cpu_row_s = (bank_cpu_s() - cpu) / options.clips
    row(
        f"rows/s until on storage: {most:,.0f}, one worker alone {alone:,.0f} ({most / alone:.2f}x)"
    )
    row(f"a round of given labels: {make_round(client, options.clips):.1f} s")
    row("| | rows/s | push p50, p99 | poll p50, p99 | longest flush |")
    row("|---|---|---|---|---|")
    waits = one.train(time.time(), 0.5, 20)
    told("one worker alone", 20 * ROWS / 10, waits)
    at_rate(crowds, options)
    dropped = one.dropped() + sum(ray.get([crowd.dropped.remote() for crowd in crowds]))
    row(f"rows dropped: {dropped}")
    memory()
    need = 64 * ROWS_PER_GPU
    a_bank = need / POOL.bank_actors
    row(f"64 GPUs: {need:,.0f} rows/s, {need * ROW_BYTES / 1e6:.0f} MB/s; of {POOL.bank_actors}")
    row(f"banks each {a_bank:,.0f} rows/s, at {1e6 * cpu_row_s:.0f} us of CPU a row")
    row(f"{a_bank * cpu_row_s:.2f} of a core")
    for crowd in crowds:
        ray.kill(crowd)
    pool.close()


def at_rate(crowds: list[Any], options: argparse.Namespace) -> None:
    """Print a row: all workers at the rate of 8 GPUs."""
    need = 8 * ROWS_PER_GPU
    period_s = options.workers * ROWS / need
    steps = max(1, round(options.seconds / period_s))
    start = time.time() + 2.0
    parts = ray.get([crowd.train.remote(start, period_s, steps) for crowd in crowds])
    wall = time.time() - start
    columns = zip(*parts, strict=True)
    waits = Waits(*([one for part in column for one in part] for column in columns))
    rate = len(waits.pushes) * ROWS / wall
    told(f"{options.workers} at the rate of 8 GPUs, {need:,.0f} rows/s", rate, waits)


def told(what: str, rate: float, waits: Waits) -> None:
    """Print a row of waits."""
    push, poll = (
        ", ".join(f"{1e3 * np.quantile(seconds, q):.1f}" for q in (0.5, 0.99))
        for seconds in (waits.pushes, waits.polls)
    )
    row(f"| {what} | {rate:,.0f} | {push} ms | {poll} ms | {max(waits.flushes):.2f} s |")


def memory() -> None:
    """Print what each kind of actor holds."""
    for name, found in sorted(uses().items()):
        resident, own = (
            f"{min(sizes) / 1e6:.0f} to {max(sizes) / 1e6:.0f} MB"
            for sizes in ([use.resident for use in found], [use.own for use in found])
        )
        row(f"{name}: {len(found)}, resident {resident}, its own {own}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--clips", type=int, default=183_730)
    parser.add_argument("--seconds", type=float, default=40.0)
    options = parser.parse_args()
    # As training workers run, which a shared machine would else put behind everything.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=32, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        at_scale(options, f"{folder}/scale")


if __name__ == "__main__":
    main()
