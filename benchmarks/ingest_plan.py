"""How long does an ingest take to see that there is nothing to do?

Builds a clips table of N clips as a run leaves it (one commit per 2,048 clips) and a listing that
equals it, then plans in a fresh process. Prints a table; writes only to a temporary folder.

    python benchmarks/ingest_plan.py [--clips 200000 2000000]

Targets: 200,000 clips in 3 s; 2,000,000 in 30 s and 3 GB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import FeatureSpec
from pipeline.store.schema import CLIPS_SCHEMA, SOURCE_SCHEMA
from pipeline.store.store import FeatureStore

CLIPS_PER_COMMIT = 2048

_PLAN = """
import json, resource, sys, time
began = time.monotonic()
import pyarrow.parquet as pq
from pipeline.config import FeatureSpec, IngestConfig
from pipeline.ingest.plan import STATE_COLUMNS, make_plan
from pipeline.store.store import FeatureStore
snapshot = FeatureStore.open(sys.argv[1]).snapshot()
sources = pq.read_table(sys.argv[2])
plan = make_plan(sources, snapshot.states(STATE_COLUMNS), snapshot.spec_hash, IngestConfig())
assert plan.is_empty and plan.counts["unchanged"] == len(sources), plan.counts
print(json.dumps({
    "seconds": time.monotonic() - began,
    "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "ray": "ray" in sys.modules,
}))
"""


def listing(n: int) -> pa.Table:
    """N clips with names, sizes and times like VGGSound's."""
    rng = np.random.default_rng(0)
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))
    ytids = letters[rng.integers(64, size=(n, 11))].view("U11")[:, 0]
    starts = rng.integers(0, 600, n)
    ids = [f"{ytid}_{start:06d}" for ytid, start in zip(ytids, starts, strict=True)]
    sizes, times = rng.integers(10**5, 10**6, n), rng.integers(10**18, 2 * 10**18, n)
    columns = {
        "clip_id": ids,
        "uri": [f"/data/vggsound/videos/{clip_id}.mp4" for clip_id in ids],
        "label": [f"class number {k}" for k in rng.integers(309, size=n)],
        "split": np.where(rng.random(n) < 0.92, "train", "test"),
        "fp_kind": ["stat"] * n,
        "fp": [f"{size}-{mtime}" for size, mtime in zip(sizes, times, strict=True)],
        "size": sizes,
        "mtime_ns": times,
        "group": ytids,
    }
    return pa.table(
        [
            pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n, f.type)
            for f in SOURCE_SCHEMA
        ],
        schema=SOURCE_SCHEMA,
    )


def fill_store(uri: str, sources: pa.Table) -> list[float]:
    """Commit the clips as an ingest would. Returns the seconds of each commit."""
    spec = FeatureSpec()
    store = FeatureStore.create(uri, spec)
    seconds = []
    order = np.random.default_rng(1).permutation(len(sources))
    for begin in range(0, len(sources), CLIPS_PER_COMMIT):
        part = sources.take(order[begin : begin + CLIPS_PER_COMMIT])
        n = len(part)
        constant = {"status": "ok", "attempts": 1, "spec_hash": spec.spec_hash(), "run_id": "r"}
        columns = {
            "shard": [f"features/part-r-{begin + i // 256:06d}-0.parquet" for i in range(n)],
            "row": [i % 256 for i in range(n)],
            "row_key": [f"{begin + i:024x}" for i in range(n)],
        }
        rows = [
            part[f.name]
            if f.name in part.column_names
            else pa.array(columns.get(f.name, [constant.get(f.name)] * n), f.type)
            for f in CLIPS_SCHEMA
        ]
        began = time.monotonic()
        store.append(pa.table(rows, schema=CLIPS_SCHEMA), {"run_id": "r"})
        seconds.append(time.monotonic() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, nargs="+", default=[200_000, 2_000_000])
    counts = parser.parse_args().clips
    print("| clips | commits | first 20 commits, each | last 20, each | no-op plan | peak memory |")
    print("|---|---|---|---|---|---|")
    for n in counts:
        with tempfile.TemporaryDirectory() as folder:
            sources = listing(n)
            seconds = fill_store(f"{folder}/store", sources)
            pq.write_table(sources, Path(folder) / "sources.parquet")
            del sources
            command = [sys.executable, "-c", _PLAN, f"{folder}/store", f"{folder}/sources.parquet"]
            plan = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            assert not plan["ray"]
            first, last = np.median(seconds[:20]), np.median(seconds[-20:])
            print(
                f"| {n:,} | {len(seconds)} | {1000 * first:.0f} ms | {1000 * last:.0f} ms "
                f"| {plan['seconds']:.2f} s | {plan['gb']:.2f} GB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
