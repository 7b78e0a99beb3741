"""What a checkpoint of the feature bank costs: names of segments against a copy of all rows.

    python benchmarks/bank_checkpoints.py [--clips 183730] [--width 768] [--checkpoints 20]

A bank of `--clips` rows, then `--checkpoints` times: push the rows of some training steps
(`--pushed`, 5 % of the bank), write them to the log as training does, and save. The peer is the
bank written whole, as before it was kept in segments; both write the same log. Reported: bytes that
appear on storage at a checkpoint beyond the log of the pushed rows, seconds that training waits,
and the seconds and bytes of reading the last state back. Rounds are not frozen in between, which
would make a new base for nothing.

A trainer's own checkpoint holds the confusion of K classes: `--k`, with 1 and with 4 workers. The
peer is the sums of each worker, [workers, K, K] in float64, which stood in it before.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from clustering.pool.bank_actor import BankActor
from clustering.rounds.bank import BankRows
from clustering.rounds.frozen import Owner, write_rows
from clustering.rounds.saved import forget_saved, kept_files, read_saved, write_saved
from training.config import ConfusionConfig
from training.losses.confusion import ConfusionState

_VSHARDS = 64
_STEP_ROWS, _SYNC_ROWS = 256, 8192
_KEPT = 3


class Cost(NamedTuple):
    """Of one checkpoint."""

    pushed_bytes: int
    segments_bytes: int
    """New on storage from the push to the end of the save, merges included."""
    whole_bytes: int
    segments_s: float
    whole_s: float


def rows_of(keys: np.ndarray, step: int, width: int, rng: np.random.Generator) -> BankRows:
    """Features of some clips at a step."""
    values = rng.integers(1, 2**15 - 2**10, (len(keys), width), np.uint16).view(np.float16)
    return BankRows(keys, np.full(len(keys), step, np.int64), values)


def parquet(folder: Path) -> dict[str, int]:
    """Bytes of each file of rows."""
    return {str(path): path.stat().st_size for path in folder.rglob("*.parquet")}


def push(bank: BankActor, keys: np.ndarray, step: int, options: argparse.Namespace) -> int:
    """Push one batch after the other, written down as a sender has it done. Returns: the step."""
    rng = np.random.default_rng(step)
    for begin in range(0, len(keys), _STEP_ROWS):
        step += 1
        bank.push(*rows_of(keys[begin : begin + _STEP_ROWS], step, options.width, rng))
        if (begin + _STEP_ROWS) % _SYNC_ROWS == 0:
            bank.sync()
    return step


def checkpoint(
    bank: BankActor, folder: Path, keys: np.ndarray, step: int, options: argparse.Namespace
) -> tuple[int, Cost]:
    """Push, save both ways, tidy up. Returns: the step, and what it cost."""
    home, streams = folder / "rounds", {"all": options.width}
    before = parquet(home)
    step = push(bank, keys, step, options)
    began = time.perf_counter()
    write_saved(f"{home}/bank-{step:08d}", bank.saved())
    segments_s = time.perf_counter() - began
    written = sum(size for name, size in parquet(home).items() if name not in before)
    whole = folder / "whole.parquet"
    began = time.perf_counter()
    write_rows(str(whole), bank._bank.everything(), streams, _VSHARDS)
    whole_s = time.perf_counter() - began
    forget_saved(str(home), _KEPT)
    bank.forget(kept_files(str(home)))
    row_bytes = 16 + 2 * options.width
    pushed = row_bytes * len(keys)
    return step, Cost(pushed, written, whole.stat().st_size, segments_s, whole_s)


def confusion_bytes(rank: int, n_ranks: int, store: str, ks: list[int]) -> None:
    """Print, on rank 0, what the confusion of K classes is in a checkpoint of so many workers."""
    torch.set_num_threads(1)
    meet = f"file://{store}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=n_ranks)
    for k in ks:
        state = ConfusionState(torch.eye(k), torch.ones(k), ConfusionConfig())
        state.accumulate(torch.full((_STEP_ROWS, k), 1 / k), torch.arange(_STEP_ROWS) % k)
        size = sum(value.nbytes for value in state.state_dict().values())
        began = time.perf_counter()
        state.state_dict()
        spent = time.perf_counter() - began
        if rank == 0:
            sums = 8 * n_ranks * k * k / 1e6
            print(f"| {n_ranks} | {k} | {size / 1e6:.2f} MB, {spent:.3f} s | {sums:.2f} MB |")
    dist.destroy_process_group()


def confusions(ks: list[int]) -> None:
    """Print what K costs a trainer's checkpoint, by number of workers."""
    print("| workers | K | confusion in a trainer's checkpoint | sums of each worker |")
    print("|---|---|---|---|", flush=True)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for n_ranks in (1, 4):
            given = (n_ranks, f"{folder}/store-{n_ranks}", ks)
            ranks = [
                context.Process(target=confusion_bytes, args=(rank, *given))
                for rank in range(n_ranks)
            ]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            assert not any(process.exitcode for process in ranks), "a rank failed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=183_730)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--pushed", type=float, default=0.05)
    parser.add_argument("--k", type=int, nargs="+", default=[100, 600])
    options = parser.parse_args()
    order = np.random.default_rng(0)
    keys = order.choice(2**60, options.clips, replace=False).astype(np.uint64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = str(folder / "rounds")
        streams = {"all": options.width}
        owner = Owner(0, 1, _VSHARDS)
        bank = BankActor(owner, f"{home}/bank/pool/bank-0", home, streams)
        step = push(bank, keys, 0, options)
        bank.sync()
        costs = []
        visited = np.concatenate([order.permutation(keys) for _ in range(3)])
        n = int(options.pushed * options.clips)
        for number in range(options.checkpoints):
            mine = visited[number * n % options.clips :][:n]
            step, cost = checkpoint(bank, folder, mine, step, options)
            costs.append(cost)
        began = time.perf_counter()
        again = BankActor(owner, f"{home}/bank/later/bank-0", home, streams)
        again.restore(f"{home}/bank-{step:08d}")
        restore_s = time.perf_counter() - began
        files = read_saved(f"{home}/bank-{step:08d}").files
        read = sum((Path(home) / file).stat().st_size for file in files)
        same = zip(again._bank.everything(), bank._bank.everything(), strict=True)
        assert all(np.array_equal(a, b) for a, b in same), "another bank came back"
    total = Cost(*(sum(column) for column in zip(*costs, strict=True)))
    whole = total.whole_bytes / len(costs)
    print(f"{options.clips:,} rows of {options.width} values, {len(costs)} checkpoints, each after")
    print(f"{n:,} pushed rows ({total.pushed_bytes / len(costs) / 1e6:.1f} MB)")
    print("| | bytes, all | largest checkpoint | training waits, all | longest |")
    print("|---|---|---|---|---|")
    kinds = {
        "log + whole bank": [(c.pushed_bytes + c.whole_bytes, c.whole_s) for c in costs],
        "segments": [(c.segments_bytes, c.segments_s) for c in costs],
    }
    for kind, pairs in kinds.items():
        sizes, waits = zip(*pairs, strict=True)
        print(
            f"| {kind} | {sum(sizes) / 1e9:.2f} GB | {max(sizes) / 1e6:.0f} MB "
            f"| {sum(waits):.2f} s | {max(waits):.2f} s |"
        )
    extra = (total.segments_bytes - total.pushed_bytes) / total.whole_bytes
    print(f"bytes beyond the pushed rows / a whole copy each: {extra:.3f}")
    print(f"written / pushed: {total.segments_bytes / total.pushed_bytes:.2f}")
    print(f"waits / whole copy's: {total.segments_s / total.whole_s:.3f}")
    print(f"restore: {restore_s:.2f} s, {len(files)} files, {read / whole:.2f} x one pass")
    confusions(options.k)


if __name__ == "__main__":
    main()
