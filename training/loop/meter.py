"""Meter: means of metrics and times between two logs, and over an epoch.

Knows nothing of what is measured. Invariant: its state is part of a checkpoint, so that the curve
of a resumed run, and decisions taken on it, equal those of the uninterrupted one.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.losses.gather import mean_over_ranks, of_every_rank, of_this_rank


class _Block(NamedTuple):
    """A timed piece of a step."""

    name: str
    around: str | None
    """The block it runs within, whose own time it is not."""


class Meter:
    """Collects tensors without waiting for the device; `flush` reads them once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.epoch_sums: dict[str, float] = {}
        self.epoch_counts: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.spans: list[tuple[_Block, torch.cuda.Event, torch.cuda.Event]] = []
        self.open: list[str] = []
        self.kept: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.since_step = 0
        self.since = time.monotonic()

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one step's scalars to the running means."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
            self.counts[name] = self.counts.get(name, 0) + 1

    def keep(self, name: str, value: float) -> None:
        """A value that is logged as it last was."""
        self.kept[name] = value

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall time of a block to `time/<name>`.

        A block within another counts for itself alone, so that the parts of a step add up.
        """
        started = time.monotonic()
        with self._within(name) as block:
            try:
                yield
            finally:
                self._spend(block, time.monotonic() - started)

    @contextlib.contextmanager
    def computed(self, name: str) -> Iterator[None]:
        """Add the device's time for what a block queues to `time/<name>`; on a CPU, as `timed`."""
        if self.device.type != "cuda":
            with self.timed(name):
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with self._within(name) as block:
            try:
                yield
            finally:
                end.record()
                self.spans.append((block, begin, end))

    @contextlib.contextmanager
    def _within(self, name: str) -> Iterator["_Block"]:
        block = _Block(name, around=self.open[-1] if self.open else None)
        self.open.append(name)
        try:
            yield block
        finally:
            self.open.pop()

    def _spend(self, block: "_Block", seconds: float) -> None:
        self.seconds[block.name] = self.seconds.get(block.name, 0.0) + seconds
        if block.around is not None:
            self.seconds[block.around] = self.seconds.get(block.around, 0.0) - seconds

    def flush(self, step: int, batch_size: int) -> dict[str, float]:
        """Means over the steps since the last flush and over ranks; collective."""
        names = sorted(self.sums)
        means = {}
        if names:
            stacked = torch.stack([self.sums[n] / self.counts[n] for n in names])
            means = dict(zip(names, mean_over_ranks(stacked).tolist(), strict=True))
        for name in names:
            n = self.counts[name]
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + means[name] * n
            self.epoch_counts[name] = self.epoch_counts.get(name, 0) + n
        for block, begin, end in self.spans:
            end.synchronize()
            self._spend(block, begin.elapsed_time(end) / 1000)
        steps = max(1, step - self.since_step)
        now = time.monotonic()
        out = means | self.kept
        out |= {f"time/{name}": s / steps for name, s in self.seconds.items()}
        out["clips_per_s"] = steps * batch_size / max(1e-9, now - self.since)
        self.sums, self.counts, self.seconds, self.spans = {}, {}, {}, []
        self.since, self.since_step, self.last = now, step, out
        return dict(out)

    def epoch_mean(self, name: str) -> float:
        """Mean over the epoch that has just been flushed; starts the next epoch's means."""
        mean = self.epoch_sums.get(name, float("inf")) / max(1, self.epoch_counts.get(name, 0))
        self.epoch_sums, self.epoch_counts = {}, {}
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Running sums of every rank; times are not part of a result. Collective."""
        names = sorted(self.sums)
        sums = (
            torch.stack([self.sums[n] for n in names])
            if names
            else torch.zeros(0, device=self.device)
        )
        return {
            "names": names,
            "sums_WN": of_every_rank(sums).cpu(),
            "counts": dict(self.counts),
            "epoch_sums": dict(self.epoch_sums),
            "epoch_counts": dict(self.epoch_counts),
            "since_step": self.since_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over running sums."""
        sums_N = of_this_rank(state["sums_WN"]).to(self.device)
        self.sums = dict(zip(state["names"], sums_N, strict=True))
        self.counts = dict(state["counts"])
        self.epoch_sums = dict(state["epoch_sums"])
        self.epoch_counts = dict(state["epoch_counts"])
        self.since_step = state["since_step"]
        self.since = time.monotonic()
