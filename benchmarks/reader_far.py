"""How fast training reads a store that is far away: shards together, and kept on this machine.

    python benchmarks/reader_far.py --folder /tmp/far [--delay-ms 20] [--mb-per-s 80] [--rounds 3]

Storage is a folder behind an fsspec filesystem with the defaults of s3fs (blocks of 50 MiB, read
ahead) which lets each request wait, and gives its bytes at the pace of one connection. The store is
of VGGSound's shape: 12 shards of 256 clips of ten frames and an fbank, 23 MB a row group.
Read are windows of 512 clips, decoded, as a reader of one of eight workers gets them. The peer is
the reader of before: one shard after the other, opened with fsspec's defaults, its footer asked for
each time.
Then an epoch is read into a `ShardCache` on this machine, and later ones from it, against the same
epochs without one, each as by a new process. The disk is the page cache here: what was written a
minute ago is read from memory.
Reported: clips per second, requests and bytes asked for a clip, and the ratios.
"""

import argparse
import contextlib
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import fsspec
import numpy as np
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from pipeline.config import FeatureSpec
from pipeline.decode.payload import encode_jpeg
from pipeline.storage import Location
from pipeline.store import shards
from pipeline.store.cached import ShardCache
from pipeline.store.shards import ShardWriter
from training.config import DataConfig
from training.data import reader
from training.data.order import BatchPlan, EpochReads, FrameDraw, Window, WindowPlan
from training.data.rows import RowIndex

SPEC = FeatureSpec()
N_SHARDS, SHARD_CLIPS = 12, 256
BATCH = 64


class Far(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A folder at the end of a long wire; requests of several threads do not wait for each other.

    No `LocalFileSystem`, which our code would take for a disk.
    """

    protocol = "far"
    delay_s, bytes_per_s = 0.0, float("inf")
    n_requests = n_bytes = 0
    _counting = threading.Lock()

    def asked(self, n_bytes: int) -> None:
        """One request and its answer."""
        with self._counting:
            Far.n_requests += 1
            Far.n_bytes += n_bytes
        time.sleep(self.delay_s + n_bytes / self.bytes_per_s)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Size of a file."""
        self.asked(0)
        path = self._strip_protocol(path)
        return {"name": path, "size": os.path.getsize(path), "type": "file"}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("far://")

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **options: Any) -> Any:
        return FarFile(self, path, mode, block_size or 50 * 2**20, **options)


class FarFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A file that is asked for by ranges."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            content = file.read(end - start)
        self.fs.asked(len(content))
        return content


def make_store(folder: str) -> RowIndex:
    """Shards of noise, and their clips; no clips table, which a reader does not see."""
    location, rng = Location(folder), np.random.default_rng(0)
    size = (32, SPEC.frame_size // 8, SPEC.frame_size // 8, 3)
    small = rng.integers(0, 256, size, np.uint8)
    jpegs = [encode_jpeg(image.repeat(8, 0).repeat(8, 1), 95) for image in small]
    names = [f"features/part-far-{number:06d}-0.parquet" for number in range(N_SHARDS)]
    for number, name in enumerate(names):
        if Path(folder, name).exists():
            continue
        writer = ShardWriter(location, name, SPEC)
        for clip in range(SHARD_CLIPS):
            fbank = rng.normal(size=(SPEC.fbank_frames, SPEC.n_mels)).astype(np.float16)
            which = rng.integers(0, len(jpegs), SPEC.n_frames)
            writer.add(
                {
                    "clip_id": f"{number}-{clip}", "row_key": f"{number}-{clip}",
                    "frames": [jpegs[i] for i in which], "frame_ts_ms": [0] * SPEC.n_frames,
                    "fbank": fbank.tobytes(), "fbank_frames": SPEC.fbank_frames,
                }
            )  # fmt: skip
        writer.publish()
    n_clips = N_SHARDS * SHARD_CLIPS
    return RowIndex(
        store_uri=f"far://{folder}",
        spec=SPEC,
        shards=names,
        classes=[],
        clip_ids_N=np.arange(n_clips).astype(str).astype(object),
        keys_N=np.arange(n_clips, dtype=np.uint64),
        labels_NL=np.full((n_clips, 1), -1, np.int32),
        shards_N=np.repeat(np.arange(N_SHARDS), SHARD_CLIPS).astype(np.int32),
        rows_N=np.tile(np.arange(SHARD_CLIPS), N_SHARDS).astype(np.int32),
    )


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """The reader of before: what opens a shard, and in which order, is what this replaces."""

    def opened(location: Location, path: str, *_: object) -> Any:
        return location.fs.open(path, "rb")

    with (
        mock.patch.object(reader, "side_by_side", lambda work, items, _at_once: map(work, items)),
        mock.patch.object(shards, "_opened", opened),
        mock.patch.object(shards, "_footers", shards._Footers(most=0)),
    ):
        yield


class Read(NamedTuple):
    """What some windows took."""

    clips_per_s: float
    n_requests: float
    """For a window."""
    mb_per_clip: float


def read(windows: list[Window], cache: ShardCache | None = None) -> Read:
    """Decodes them, one after the other."""
    Far.n_requests = Far.n_bytes = n_clips = 0
    began = time.perf_counter()
    for window in windows:
        n_clips += sum(len(batch.key) for batch in reader.read_window(window, cache))
    took_s = time.perf_counter() - began
    return Read(n_clips / took_s, Far.n_requests / len(windows), Far.n_bytes / n_clips / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", required=True)
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument("--mb-per-s", type=float, default=80.0)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    fsspec.register_implementation("far", Far)
    index = make_store(options.folder)
    Far.delay_s, Far.bytes_per_s = options.delay_ms / 1e3, options.mb_per_s * 1e6
    plan = WindowPlan(
        index, BatchPlan.of(len(index), BATCH, DataConfig(lanes=1, shuffle_window=512)), range(1), 0
    )
    for number in range(options.rounds):
        windows = of_epoch(plan, number, options.windows)
        ours = read(windows)
        with as_before():
            before = read(windows)
        say(number, {"ours": ours, "one after the other": before})
    with tempfile.TemporaryDirectory(dir=Path(options.folder).parent) as folder:
        cache = ShardCache(folder, 2**40)
        everything = of_epoch(plan, options.rounds, None)
        say(0, {"into the cache": anew(everything, cache), "without": anew(everything)})
        for number in range(options.rounds):
            windows = of_epoch(plan, options.rounds + 1 + number, options.windows)
            cached = anew(windows, cache)
            say(number, {"from the cache": cached, "without": anew(windows)})


def anew(windows: list[Window], cache: ShardCache | None = None) -> Read:
    """The same, as a process that knows no footer yet."""
    with mock.patch.object(shards, "_footers", shards._Footers(most=512)):
        return read(windows, cache)


def of_epoch(plan: WindowPlan, number: int, most: int | None) -> list[Window]:
    """The first windows of an epoch, or all."""
    windows = plan.windows(EpochReads(number, 0, FrameDraw(1)))
    return list(itertools.islice(windows, most))


def say(number: int, both: dict[str, Read]) -> None:
    """What was found, and the ratio of the first to the second."""
    for name, found in both.items():
        print(
            f"round {number}  {name:<20} {found.clips_per_s:>6.0f} clips/s  "
            f"{found.n_requests:>5.1f} requests a window  {found.mb_per_clip:.2f} MB a clip"
        )
    (ours, peer), names = (found.clips_per_s for found in both.values()), " / ".join(both)
    print(f"round {number}  {names} = {ours / peer:.1f}", flush=True)


if __name__ == "__main__":
    main()
