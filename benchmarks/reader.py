"""How fast training gets its batches: our reader against a torch DataLoader on the same shards.

    python benchmarks/reader.py --store STORE [--batch 64] [--steps 60]

Both give one random frame and the fbank of each clip, decoded, in batches. The DataLoader is what
one would write without a plan: a map-style data set over the same rows, shuffled, one row read at a
time from memory-mapped shards that stay open. Reported: clips per second of CPU in this process
(one core, no Ray), and the ratio.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.decode.payload import decode_jpegs, fbank_array
from pipeline.store.store import FeatureStore
from training.config import DataConfig
from training.data.order import BatchPlan, EpochReads, FrameDraw, WindowPlan
from training.data.reader import Batch, LocalReader
from training.data.rows import RowIndex, index_rows


class RowDataset(Dataset[dict[str, np.ndarray]]):
    """One row of a shard at a time: the row group it is in, then the row."""

    def __init__(self, index: RowIndex) -> None:
        self.index = index
        self.files: dict[int, pq.ParquetFile] = {}
        self.group: tuple[int, int] = (-1, -1)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        shard, row = int(self.index.shards_N[i]), int(self.index.rows_N[i])
        if shard not in self.files:
            path = f"{self.index.store_uri}/{self.index.shards[shard]}"
            self.files[shard] = pq.ParquetFile(path, memory_map=True)
        table = self.files[shard].read_row_group(row // 64, columns=["frames", "fbank"])
        frames, fbank = table["frames"][row % 64].as_py(), table["fbank"][row % 64].as_py()
        frame = decode_jpegs([frames[np.random.randint(len(frames))]])
        return {"frames": frame, "fbank": np.array(fbank_array(fbank, self.index.spec))}


class GroupDataset(RowDataset):
    """The same with the last row group kept: kinder to a loader that reads in order."""

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        shard, row = int(self.index.shards_N[i]), int(self.index.rows_N[i])
        if self.group != (shard, row // 64):
            path = f"{self.index.store_uri}/{self.index.shards[shard]}"
            file = self.files.setdefault(shard, pq.ParquetFile(path, memory_map=True))
            self.table = file.read_row_group(row // 64, columns=["frames", "fbank"])
            self.group = (shard, row // 64)
        frames = self.table["frames"][row % 64].as_py()
        fbank = self.table["fbank"][row % 64].as_py()
        frame = decode_jpegs([frames[np.random.randint(len(frames))]])
        return {"frames": frame, "fbank": np.array(fbank_array(fbank, self.index.spec))}


def rate(batches: Callable[[], Iterable[Any]], steps: int) -> float:
    """Clips per second of CPU time over `steps` batches, after one that is not counted."""
    endless = itertools.chain.from_iterable(batches() for _ in itertools.count())
    next(endless)
    started, clips = time.process_time(), 0
    for batch in itertools.islice(endless, steps):
        clips += len(batch.fbank if isinstance(batch, Batch) else batch["fbank"])
    return clips / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    index = index_rows(FeatureStore.open(options.store).snapshot(), "train")
    plan = BatchPlan.of(len(index), options.batch, DataConfig())
    reader = LocalReader(WindowPlan(index, plan, range(plan.lanes), seed=0))

    epochs = itertools.count()

    def ours() -> Iterator[Batch]:
        return reader.stream([EpochReads(next(epochs), 0, FrameDraw(1))])

    def shuffled() -> Iterable[Any]:
        return DataLoader(RowDataset(index), options.batch, shuffle=True)

    def sequential() -> Iterable[Any]:
        return DataLoader(GroupDataset(index), options.batch, shuffle=False)

    few = max(2, options.steps // 20)
    results = {
        "ours (shuffled by windows)": rate(ours, options.steps),
        "DataLoader, shuffled": rate(shuffled, few),
        "DataLoader, in stored order (no shuffle)": rate(sequential, options.steps),
    }
    base = results["ours (shuffled by windows)"]
    spec = index.spec
    print(f"{len(index):,} clips, {spec.frame_size} px, fbank {spec.fbank_frames} x {spec.n_mels}")
    for name, value in results.items():
        print(f"{name:<42} {value:>8,.0f} clips/s per core   ours / it = {base / value:.2f}")


if __name__ == "__main__":
    main()
