"""What does `store quality` cost, against the decode of the same clips?

Both in one run, in this process and its decode children, in CPU seconds, so that other load on the
machine hardly matters; the best of `--rounds` is kept, for each size of picture.

- decode:   the clips through a ShardDecoder, fbanks and shard files included (the baseline)
- features: the quality of what that stored
- sources:  the pass over the files
- twins:    the search for duplicates, per clip, among 20,000 prints of noise
- whole:    all three, above the start of the child that opens containers

    python benchmarks/quality.py --videos FOLDER [--copies 20] [--most 6]

Every readable clip is linked `--copies` times, so that the start of processes does not count.
Target: whole <= 0.10x decode. Prints a table; writes only to temporary folders.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

# As an fbank service is started.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}

import av
import numpy as np
import psutil

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.decode.clip import extract
from pipeline.decode.payload import Fbanks, fbanks_function
from pipeline.ingest.plan import STATE_COLUMNS, make_plan
from pipeline.ingest.shard_decoder import ShardDecoder
from pipeline.quality.duplicates import Prints, find_twins
from pipeline.quality.features import PICTURE_WIDTH, SOUND_BANDS
from pipeline.quality.scan import ScanSettings, scan
from pipeline.source.listing import list_sources
from pipeline.store.identity import store_id
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.store import FeatureStore


def cpu_seconds() -> float:
    """CPU of this process, of its living children, and of those it waited for."""
    times = psutil.Process().cpu_times()
    own = time.process_time() + times.children_user + times.children_system
    for child in psutil.Process().children(recursive=True):
        own += sum(child.cpu_times()[:2])
    return own


def by_size(folder: Path, spec: FeatureSpec, most: int) -> dict[str, list[Path]]:
    """Readable clips of the folder by size of picture."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                size = f"{stream.width}x{stream.height}"
            clip = extract(str(path), None, None, spec)
        except Exception:  # A folder of test files holds broken ones: not what is measured here.
            continue
        if clip.video_s > 0.9 * spec.duration_s and len(found.setdefault(size, [])) < most:
            found[size].append(path)
    return {size: paths for size, paths in found.items() if paths}


def decode(folder: Path, spec: FeatureSpec, fbanks: Fbanks) -> tuple[str, float]:
    """A store of the clips of a folder, and the CPU its decode took."""
    config = IngestConfig(child_clips=10**6)
    store = FeatureStore.create(str(folder / "store"), spec)
    no_states = CLIPS_SCHEMA.empty_table().select(STATE_COLUMNS)
    sources = list_sources(str(folder / "clips.csv"), str(folder / "videos")).clips
    todo = make_plan(sources, no_states, spec.spec_hash(), config).todo
    decoder = ShardDecoder(
        store.uri, spec, config, "bench", fbanks, expected_id=store_id(store.location)
    )
    warm = todo.slice(0, 1)
    list(decoder.decode(0, warm))  # The child starts.
    began = cpu_seconds()
    for states in decoder.decode(1, todo):
        store.append(states, {})
    return store.uri, cpu_seconds() - began


def measure(paths: list[Path], spec: FeatureSpec, copies: int, fbanks: Fbanks) -> dict[str, float]:
    """CPU milliseconds a clip."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "videos").mkdir()
        lines = []
        for i, path in enumerate(paths * copies):
            os.symlink(path.resolve(), folder / "videos" / f"clip{i:07d}_000000{path.suffix}")
            lines.append(f"clip{i:07d},0,one,train\n")
        (folder / "clips.csv").write_text("".join(lines))
        uri, seconds = decode(folder, spec, fbanks)
        found = {"decode": seconds}
        # Links to one file are each other's duplicates: that search is timed by itself.
        clips = FeatureStore.open(uri).snapshot().clips
        for part, reads_sources in (("features", False), ("both", True)):
            began = cpu_seconds()
            settings = ScanSettings(uri, spec, reads_sources)
            n_done = sum(map(len, scan(clips, settings, workers=1)))
            assert n_done == len(lines)
            found[part] = cpu_seconds() - began
        found["sources"] = found.pop("both") - found["features"] - _child_start(folder)
    return {part: 1000 * value / len(lines) for part, value in found.items()}


def twins_ms(n: int) -> float:
    """CPU milliseconds a clip of the search for duplicates among n."""
    rng = np.random.default_rng(0)
    prints = [
        Prints(
            rng.normal(rng.uniform(40, 200, PICTURE_WIDTH), 20, (8, PICTURE_WIDTH))
            .clip(0, 255)
            .astype(np.uint8),
            np.arange(500, 10000, 1250),
            rng.integers(0, 255, (204, SOUND_BANDS), np.uint8),
        )
        for _ in range(n)
    ]
    began = cpu_seconds()
    list(find_twins(prints, np.ones(n, bool)))
    return 1000 * (cpu_seconds() - began) / n


def _child_start(folder: Path) -> float:
    """CPU of starting the child that opens containers."""
    from pipeline.decode.sandbox import Sandbox

    began = cpu_seconds()
    sandbox = Sandbox(
        "pipeline.quality.container:probe_source", timeout_s=60, max_calls=500, max_memory_mb=1024
    )
    sandbox.submit(str(folder / "clips.csv"), None, 1.0)
    sandbox.result()
    sandbox.close()
    return cpu_seconds() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", required=True)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--most", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    spec = FeatureSpec()
    fbanks = fbanks_function(spec)
    twins = twins_ms(20_000)
    print("| size | clips | decode ms | features ms | sources ms | twins ms | whole / decode |")
    print("|---|---|---|---|---|---|---|")
    for size, paths in by_size(Path(options.videos), spec, options.most).items():
        rounds = [measure(paths, spec, options.copies, fbanks) for _ in range(options.rounds)]
        best = {part: min(found[part] for found in rounds) for part in rounds[0]}
        print(
            f"| {size} | {len(paths) * options.copies} | {best['decode']:.1f} "
            f"| {best['features']:.1f} | {best['sources']:.1f} | {twins:.2f} "
            f"| {(best['features'] + best['sources'] + twins) / best['decode']:.3f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
