"""Does the memory of an ingest grow with the number of clips?

Two ingests over Ray of the same kind of clips in shards of the same size, the second of ten times
as many; the resident memory of the driver and of every process below it is looked at five times a
second. Clips are links to the files given, so that a folder with few of them is enough.

    python benchmarks/ingest_memory.py --videos FOLDER [--clips 200]

Targets: with 10x the clips each kind of process below 1.1x; a decode actor below 700 MB.
Prints a table; writes only to temporary folders.
"""

import argparse
import contextlib
import itertools
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.ingest.run import ingest

KINDS = {
    "decode actor": "_DecodeActor",
    "decode child": "pipeline.decode.sandbox",
    "fbank service": "pipeline.decode.fbank_service",
}


@contextlib.contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """The largest resident memory of each kind of process while the body runs, MB."""
    found = dict.fromkeys(["driver", *KINDS], 0.0)
    stop = threading.Event()

    def look() -> None:
        me = psutil.Process()
        while not stop.wait(0.2):
            found["driver"] = max(found["driver"], me.memory_info().rss / 2**20)
            for process in me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    command = " ".join(process.cmdline())
                    for kind, part in KINDS.items():
                        if part in command:
                            size = process.memory_info().rss / 2**20
                            found[kind] = max(found[kind], size)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def run(files: list[Path], n_clips: int, shard_clips: int) -> dict[str, float]:
    """Ingest n_clips links to `files` with a Ray of its own."""
    # However few: up to `local_clips` would be decoded without Ray.
    config = IngestConfig(shard_clips=shard_clips, max_failed_frac=1.0, local_clips=0)
    with tempfile.TemporaryDirectory() as tmp:
        videos, csv = Path(tmp) / "videos", Path(tmp) / "clips.csv"
        videos.mkdir()
        with csv.open("w") as rows:
            for i, file in zip(range(n_clips), itertools.cycle(files), strict=False):
                (videos / f"clip{i:07d}_{i:06d}{file.suffix}").symlink_to(file.resolve())
                rows.write(f"clip{i:07d},{i},dog,train\n")
        with peaks() as found:
            ray.init(address="local", include_dashboard=False, log_to_driver=False)
            ingest(str(csv), str(videos), f"{tmp}/store", FeatureSpec(), config,
                   start_ray=lambda: None, on_progress=lambda progress: None)  # fmt: skip
            ray.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=200)
    options = parser.parse_args()
    files = sorted(file for file in options.videos.iterdir() if file.suffix != ".md")
    # Small enough that the few clips fill shards, too.
    shard_clips = max(16, options.clips // 8)
    few, many = (run(files, n * options.clips, shard_clips) for n in (1, 10))
    print(f"| | {options.clips} clips, MB | {10 * options.clips} clips, MB | ratio |")
    print("|---|---|---|---|")
    for kind, size in few.items():
        print(f"| {kind} | {size:.0f} | {many[kind]:.0f} | {many[kind] / size:.2f}x |")


if __name__ == "__main__":
    main()
