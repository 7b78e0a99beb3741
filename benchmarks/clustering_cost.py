"""What clustering costs, as ratios in one run; one thread per process, CPU seconds where possible.

    python benchmarks/clustering_cost.py [--out FOLDER] [--only kernel pool warm scaling ...]

Knows nothing of training. Each section prints a table with its target; `scaling` also writes
clustering-scaling.png. Wall times on a shared machine are noisy, so ratios are of CPU seconds.

The arithmetic for 100 million x 512 and K = 3,000 on 100 actors is printed by `scaling`, from the
time per multiply-add measured in the same run.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import ray
import threadpoolctl
from matplotlib.figure import Figure

from clustering.config import KMeansConfig, PoolConfig
from clustering.kmeans.fit_plan import plan_fit
from clustering.kmeans.label_table import LabelTable
from clustering.kmeans.lloyd import fit, kmeans
from clustering.kmeans.passes import LocalPasses, Passes
from clustering.kmeans.share import RowBlock, Share
from clustering.kmeans.space import whole_rows
from clustering.pool.compute import RayPasses, compute_actors, stop
from clustering.pool.pool import ClusterPool
from clustering.rounds.protocol import HeadLabels, RoundRequest

ITERATIONS = 5


def unit_rows(n: int, d: int, k: int, noise: float = 1.0, seed: int = 0) -> np.ndarray:
    """Planted spherical mixture of k classes, float32 [n, d]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(k, d)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = x[rng.integers(k, size=n)]
    x += rng.normal(size=(n, d)).astype(np.float32) * np.float32(noise / np.sqrt(d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def row(*cells: Any) -> None:
    print(
        "  ".join(
            f"{cell:.3f}".rjust(12) if isinstance(cell, float) else str(cell).rjust(12)
            for cell in cells
        )
    )


def cpu_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Least CPU seconds of this process over some repeats."""
    best = np.inf
    for _ in range(repeats):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


class GeneratedSource:
    """Rows made on the spot, so that an actor's memory can be measured."""

    keep_rows = False

    def __init__(self, n: int, d: int, k: int, part: int) -> None:
        self.token = f"{n}-{d}-{k}-{part}"
        self._shape, self._part = (n, d, k), part

    def blocks(self) -> Any:
        n, d, k = self._shape
        for start in range(0, n, 16384):
            rows = min(16384, n - start)
            first = self._part * n + start
            x = unit_rows(rows, d, k, seed=first)
            yield RowBlock(np.arange(first, first + rows, dtype=np.uint64), x)


def our_iterations(x: np.ndarray, k: int) -> Callable[[int], Callable[[], Any]]:
    """Runs of so many iterations from the first k rows."""

    def run(iterations: int) -> Callable[[], Any]:
        config = KMeansConfig(k=k, iterations=iterations, tol=0, empty="keep")
        return lambda: kmeans(x, config, init_KD=x[:k].copy())

    return run


def faiss_iterations(x: np.ndarray, k: int) -> Callable[[int], Callable[[], Any]]:
    """The same by faiss."""

    def run(iterations: int) -> Callable[[], Any]:
        options = {"spherical": True, "max_points_per_centroid": 10**9}
        options["min_points_per_centroid"] = 1
        made = faiss.Kmeans(x.shape[1], k, niter=iterations, **options)
        return lambda: made.train(x, init_centroids=x[:k].copy())

    return run


def iteration_cpu(*makers: Callable[[int], Callable[[], Any]], repeats: int = 5) -> list[float]:
    """CPU seconds of one iteration of each: a run of six less a run of one, interleaved."""
    long, short = [[np.inf] * len(makers) for _ in range(2)]
    for _ in range(repeats):
        for i, maker in enumerate(makers):
            long[i] = min(long[i], cpu_seconds(maker(6), 1))
            short[i] = min(short[i], cpu_seconds(maker(1), 1))
    return [(a - b) / 5 for a, b in zip(long, short, strict=True)]


def kernel() -> None:
    """One thread, one iteration, against faiss."""
    row("N", "d", "K", "faiss s", "ours s", "ratio", "target")
    for d, k in [(128, 309), (128, 1000), (512, 309), (512, 1000), (768, 1000)]:
        x = unit_rows(20_000, d, k)
        theirs, ours = iteration_cpu(faiss_iterations(x, k), our_iterations(x, k), repeats=7)
        row(20_000, d, k, theirs, ours, ours / theirs, "<= 1.15" if k * d >= 128_000 else "<= 1.25")


def actor_cpu(actors: list[Any]) -> float:
    spent = ray.get([a.__ray_call__.remote(lambda _: time.process_time()) for a in actors])
    return float(sum(spent))


def actor_memory(actor: Any) -> float:
    def resident(_: Any) -> float:
        import psutil

        return psutil.Process().memory_info().rss / 2**20

    return float(ray.get(actor.__ray_call__.remote(resident)))


def pool() -> None:
    """Two actors and their driver against one process, total CPU of five iterations."""
    row("N", "d", "K", "one s", "actors s", "driver s", "ratio", "target")
    for n, d, k in [(60_000, 512, 309), (40_000, 512, 1000)]:
        sources = [GeneratedSource(n // 2, d, k, part) for part in (0, 1)]
        config = KMeansConfig(k=k)
        single = LocalPasses(Share(BothSources(sources), config.block_rows, "cpu"))
        one, _ = iterations_cpu(single, [], d, k)
        actors = compute_actors(config, PoolConfig().groups(config).compute)
        driver, theirs = iterations_cpu(
            RayPasses(actors, sources, "driver", PoolConfig().fan_in), actors, d, k
        )
        row(n, d, k, one, theirs, driver, (theirs + driver) / one, "<= 1.20")
        stop(actors)


def iterations_cpu(passes: Passes, actors: list[Any], d: int, k: int) -> tuple[float, float]:
    """Least CPU seconds of five iterations: of this process, and of the actors."""
    config = KMeansConfig(k=k, iterations=ITERATIONS, tol=0)
    plan = plan_fit(passes, whole_rows(d, spherical=True), config, 0)
    start = unit_rows(k, d, k, seed=99)
    spent = []
    for _ in range(4):
        before, here = actor_cpu(actors), time.process_time()
        fit(passes, plan, config, 0, init_KD=start)
        spent.append((time.process_time() - here, actor_cpu(actors) - before))
    return min(spent, key=sum)


class BothSources:
    """Two sources as one."""

    keep_rows = False

    def __init__(self, sources: list[GeneratedSource]) -> None:
        self.token, self._sources = "both", sources

    def blocks(self) -> Any:
        for source in self._sources:
            yield from source.blocks()


def warm() -> None:
    """Iterations to tol 1e-4 after the features moved, from the old labels and from nothing."""
    row("cos(x, x')", "warm", "cold random", "ratio", "cold ++", "same ids", "target")
    x = unit_rows(20_000, 128, 309, noise=1.6)
    random = KMeansConfig(k=309, iterations=60, warm_iterations=60, init="random")
    refined = random.model_copy(update={"init": "kmeans++"})
    first = kmeans(x, random, seed=0)
    rng = np.random.default_rng(1)
    for noise in (0.1, 0.36, 0.8):
        moved = x + rng.normal(size=x.shape).astype(np.float32) * np.float32(noise / np.sqrt(128))
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        again = kmeans(moved, random, seed=1, warm=LabelTable(first.keys_N, first.labels_N))
        cold = kmeans(moved, random, seed=1)
        row(
            float((x * moved).sum(axis=1).mean()),
            again.iterations,
            cold.iterations,
            again.iterations / cold.iterations,
            kmeans(moved, refined, seed=1).iterations,
            float((again.labels_N == first.labels_N).mean()),
            "<= 0.5",
        )


def scaling(out: Path) -> None:
    """CPU per iteration against N, K, d and 1 / actors, with a plot and the arithmetic."""
    base = {"N": 40_000, "K": 300, "d": 256}
    grids = {
        "N": (10_000, 20_000, 40_000, 80_000),
        "K": (75, 150, 300, 600, 1200),
        "d": (64, 128, 256, 512),
    }
    figure = Figure(figsize=(16, 3.6))
    axes = figure.subplots(1, 4)
    row("axis", "value", "CPU s", "ns/(N K d)")
    for axis, (name, values) in zip(axes, grids.items(), strict=False):
        seconds = []
        for value in values:
            size = {**base, name: value}
            x = unit_rows(size["N"], size["d"], size["K"])
            seconds += iteration_cpu(our_iterations(x, size["K"]), repeats=3)
            row(name, value, seconds[-1], 1e9 * seconds[-1] / np.prod(list(size.values())))
        plot(axis, name, values, seconds, values[-1], seconds[-1])
    per_madd = seconds[-1] / (base["N"] * base["K"] * 512)
    shares(axes[3])
    figure.tight_layout()
    figure.savefig(out / "clustering-scaling.png", dpi=110)
    print(f"plot: {out / 'clustering-scaling.png'}")
    arithmetic(per_madd)


def plot(axis: Any, name: str, values: Any, seconds: list[float], at: float, top: float) -> None:
    axis.plot(values, seconds, "o-", label="measured")
    axis.plot(values, [top * value / at for value in values], "--", label="linear")
    axis.set(xlabel=name, ylabel="CPU seconds per iteration", xscale="log", yscale="log")
    axis.legend()


def shares(axis: Any) -> None:
    """CPU of an actor's iteration, and memory of the largest, when 1, 2, 4 share the rows."""
    n, d, k = 192_000, 256, 100
    config = KMeansConfig(k=k)
    counts, seconds = (1, 2, 4), []
    row("actors", "CPU s", "x actors", "MiB / actor", "rows MiB")
    for count in counts:
        actors = compute_actors(config, PoolConfig(n_actors=count).groups(config).compute)
        empty = max(actor_memory(actor) for actor in actors)
        sources = [GeneratedSource(n // count, d, k, part) for part in range(count)]
        passes = RayPasses(actors, sources, "driver", PoolConfig().fan_in)
        spent = sum(iterations_cpu(passes, actors, d, k)) / ITERATIONS / count
        seconds.append(spent)
        held = max(actor_memory(actor) for actor in actors) - empty
        row(count, spent, spent * count, held, n / count * d * 4 / 2**20)
        stop(actors)
    plot(axis, "rows per actor", [n / c for c in counts], seconds, n, seconds[0])


def arithmetic(per_madd: float) -> None:
    """100 million x 512, K = 3,000, on 100 one-thread actors on 12 nodes."""
    n, d, k, actors = 100_000_000, 512, 3000, 100
    assign = n * d * k * per_madd / actors
    partial = k * d * 8 / 2**20
    print(
        f"100 M x 512, K = 3,000, 100 actors, at {1e9 * per_madd:.4f} ns per multiply-add:\n"
        f"  rows per actor           {n // actors:,} = {n / actors * d * 4 / 2**30:.1f} GiB float32"
        f" ({n / actors * d * 2 / 2**30:.1f} GiB on storage as float16)\n"
        f"  assignment per iteration {assign:.0f} s on one thread per actor\n"
        f"  partial sums             {partial:.1f} MiB per actor; tree of fan-in 8: 3 hops of"
        f" <= 8 x {partial:.1f} MiB = {3 * 8 * partial * 8.4e6 / 10e9:.2f} s at 10 Gb/s\n"
        f"  centroids out            {k * d * 4 / 2**20:.1f} MiB once per node\n"
        f"  20 iterations            {20 * assign / 60:.0f} min; on 256 rows per centroid"
        f" (768,000 rows) {20 * assign * k * 256 / n:.0f} s and one labelling of {assign:.0f} s"
    )


def for_each(batches: list[np.ndarray], look_up: Callable[[np.ndarray], Any]) -> Callable[[], Any]:
    """A look-up of all of them, one after the other."""
    return lambda: [look_up(batch) for batch in batches]


def lookup_cost() -> None:
    """A batch in a table of ten million."""
    rng = np.random.default_rng(0)
    # In order and none twice. Not by np.unique, which hashes since numpy 2.3: a minute of these.
    keys = np.cumsum(rng.integers(1, 2**39, size=10_000_000)).astype(np.uint64)
    labels = rng.integers(3000, size=len(keys)).astype(np.int32)
    head = HeadLabels("mean", (), keys, labels, {}, np.eye(1, dtype=np.float32))
    row("batch", "us", "searchsorted", "target")
    for size in (64, 256):
        batches = [rng.choice(keys, size) for _ in range(200)]
        ours = cpu_seconds(for_each(batches, head.lookup))
        plain = cpu_seconds(for_each(batches, lambda b: labels[np.searchsorted(keys, b)]))
        row(size, 1e6 * ours / 200, 1e6 * plain / 200, "<= 100")


def push() -> None:
    """What a push costs the training process, with its background thread, and how long it waits."""
    streams = {"audio": 256, "video": 256, "fusion": 256}
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(64, 768)).astype(np.float16)
    row("rows", "CPU ms/push", "median ms", "p99 ms", "max ms", "target")
    with tempfile.TemporaryDirectory() as folder:
        made = ClusterPool(KMeansConfig(), PoolConfig(), streams, folder)
        client = made.client()
        client.push(np.arange(64), rows, 0)
        client.flush(60)
        waits = []
        before = time.process_time()
        for step in range(1, 1001):
            keys = rng.integers(0, 200_000, size=64)
            started = time.perf_counter()
            client.push(keys, rows, step)
            waits.append(1e3 * (time.perf_counter() - started))
            time.sleep(0.002)
        client.flush(60)
        spent = 1e3 * (time.process_time() - before) / 1000
        p50, p99, top = np.quantile(waits, [0.5, 0.99, 1.0])
        row(64, spent, float(p50), float(p99), float(top), "<= 1, <= 5")
        print(f"dropped {client.dropped} of 64,000 rows")
        made.close()


def stall() -> None:
    """Epochs of accelerator steps (the CPU waits 0.15 s), a round in each: what they lose."""
    streams = {"audio": 256, "video": 256, "fusion": 256}
    n, batch, epochs, lead, step_s = 4096, 64, 3, 20, 0.15
    rows = np.concatenate([unit_rows(n, 256, 32, seed=s) for s in range(3)], axis=1)
    rows = rows.astype(np.float16)
    row("clustering", "epoch s", "flush s", "wait s", "stall %", "target")
    for clustering in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            made = ClusterPool(KMeansConfig(k=32), PoolConfig(), streams, folder)
            client = made.client()
            ray.get([a.__ray_ready__.remote() for a in (*made.banks, *made.actors)])
            flushed, waited, step, started = 0.0, 0.0, 0, time.perf_counter()
            for epoch in range(epochs):
                for at in range(0, n, batch):
                    time.sleep(step_s)
                    step += 1
                    if not clustering:
                        continue
                    client.push(np.arange(at, at + batch), rows[at : at + batch], step)
                    if epoch and at == lead * batch:
                        waited -= time.perf_counter()
                        client.wait(epoch, 120)
                        waited += time.perf_counter()
                if clustering and epoch + 1 < epochs:
                    flushed -= time.perf_counter()
                    client.flush(60)
                    client.start(
                        RoundRequest(
                            epoch + 1, step, step + lead, expected_rows=n, posterior_temperature=0.1
                        )
                    )
                    flushed += time.perf_counter()
            spent = (time.perf_counter() - started) / epochs
            flushed, waited = flushed / (epochs - 1), waited / (epochs - 1)
            share = 100 * (flushed + waited) / spent
            row(str(clustering), spent, flushed, waited, share, "<= 1 %")
            made.close()


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the plot")
    names = ("kernel", "pool", "warm", "scaling", "lookup", "push", "stall")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    sections: dict[str, Callable[[], None]] = {
        "kernel": kernel,
        "pool": pool,
        "warm": warm,
        "scaling": lambda: scaling(arguments.out),
        "lookup": lookup_cost,
        "push": push,
        "stall": stall,
    }
    threadpoolctl.threadpool_limits(1)
    for info in threadpoolctl.threadpool_info():
        if info["user_api"] == "blas":
            print(f"{info['prefix']} {info['version']} {info['architecture']}")
    if {"pool", "scaling", "push", "stall"} & set(arguments.only):
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    for name in arguments.only:
        print(f"\n{name}: {(sections[name].__doc__ or scaling.__doc__ or '').strip()}")
        sections[name]()


if __name__ == "__main__":
    main()
