"""Batches in the planned order, decoded ahead of training.

`LocalReader` decodes in this process; `RayReader` runs the same function as Ray Data tasks.
Invariant: both give the same batches, whatever the number of tasks, and start at any step.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from training.batches import Batch, BatchPlan, RowIndex, Views, WindowReader, epoch_order


class EpochReads(NamedTuple):
    """What is read of one epoch."""

    epoch: int
    first_step: int
    views: Views


class Window(NamedTuple):
    """One piece of reading: the clips of some consecutive steps for the lanes of a worker."""

    epoch: int
    positions_SVb: np.ndarray
    views: Views


class Reader(Protocol):
    """Where a trainer gets its batches."""

    def stream(self, epochs: Iterable[EpochReads]) -> Iterator[Batch]:
        """The steps of these epochs, one after the other."""
        ...

    def sweep(self, views: Views) -> Iterator[Batch]:
        """Every clip of this worker's share once, without randomness."""
        ...


class WindowPlan:
    """Cuts epochs, or a sweep over all clips, into windows for the lanes of one worker."""

    def __init__(
        self,
        index: RowIndex,
        plan: BatchPlan,
        lanes: range,
        seed: int,
        draws: Any = None,
    ) -> None:
        self.index, self.plan, self.lanes, self.seed, self.draws = index, plan, lanes, seed, draws

    def windows(self, reads: EpochReads) -> Iterator[Window]:
        """Windows of an epoch from `first_step` on; the first may start inside a window."""
        draws_N = None if self.draws is None else self.draws(reads.epoch)
        order = epoch_order(self.index, self.plan, self.seed, reads.epoch, draws_N)
        m = self.plan.window_steps
        for start in range(reads.first_step // m * m, len(order), m):
            piece = order[max(start, reads.first_step) : start + m]
            yield Window(reads.epoch, piece[:, self.lanes.start : self.lanes.stop], reads.views)

    def sweep(self, views: Views) -> Iterator[Window]:
        """All clips in stored order; worker shares are contiguous and differ by at most one."""
        n, lanes = len(self.index), self.plan.lanes
        mine = np.arange(self.lanes.start * n // lanes, self.lanes.stop * n // lanes)
        per_step = self.plan.batch_size // lanes * len(self.lanes)
        for start in range(0, len(mine), per_step):
            yield Window(0, mine[None, None, start : start + per_step], views)


class LocalReader:
    """Decodes in this process; for tests, small sets and machines without Ray."""

    def __init__(self, windows: WindowPlan) -> None:
        self.plan = windows
        self.reader = WindowReader(windows.index, windows.seed)

    def stream(self, epochs: Iterable[EpochReads]) -> Iterator[Batch]:
        """See `Reader`."""
        for reads in epochs:
            for window in self.plan.windows(reads):
                yield from self.reader.read(window.positions_SVb, window.views, window.epoch)

    def sweep(self, views: Views) -> Iterator[Batch]:
        """See `Reader`."""
        for window in self.plan.sweep(views):
            yield from self.reader.read(window.positions_SVb, window.views, window.epoch)


class RayReader:
    """Decodes in Ray Data tasks; one data set spans all epochs, so no epoch pays a start-up."""

    def __init__(self, windows: WindowPlan, tasks: int, cpus: float, prefetch: int = 4) -> None:
        import ray

        self.plan, self.tasks, self.cpus, self.prefetch = windows, tasks, cpus, prefetch
        self._reader = ray.put(WindowReader(windows.index, windows.seed))

    def stream(self, epochs: Iterable[EpochReads]) -> Iterator[Batch]:
        """See `Reader`."""
        return self._run([w for reads in epochs for w in self.plan.windows(reads)])

    def sweep(self, views: Views) -> Iterator[Batch]:
        """See `Reader`."""
        return self._run(list(self.plan.sweep(views)))

    def _run(self, windows: list[Window]) -> Iterator[Batch]:
        import ray

        if not windows:
            return
        sizes = [w.positions_SVb[0].size for w in windows for _ in range(len(w.positions_SVb))]
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        items = [
            {
                "epoch": w.epoch,
                "steps": len(w.positions_SVb),
                "positions": w.positions_SVb.ravel(),
                "views": list(w.views),
            }
            for w in windows
        ]
        with ray.data.DataContext.current(context):
            dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                _decode_window,
                fn_kwargs={"reader": self._reader},
                batch_size=1,
                batch_format="numpy",
                num_cpus=self.cpus,
                concurrency=self.tasks,
                zero_copy_batch=True,
            )
        blocks = dataset.iter_batches(
            batch_size=None, batch_format="numpy", prefetch_batches=self.prefetch
        )
        yield from _regroup(blocks, sizes)


def _decode_window(batch: Batch, reader: Any) -> Iterator[Batch]:
    """One window as a generator of blocks, one per step."""
    import ray

    window_reader: WindowReader = (
        ray.get(reader) if not isinstance(reader, WindowReader) else reader
    )
    positions = np.asarray(batch["positions"][0]).reshape(int(batch["steps"][0]), 1, -1)
    frames_per_clip, n_views, random = batch["views"][0]
    views = Views(int(frames_per_clip), int(n_views), bool(random))
    yield from window_reader.read(positions, views, int(batch["epoch"][0]))


def _regroup(blocks: Iterable[Batch], sizes: list[int]) -> Iterator[Batch]:
    """Blocks of any length to batches of exactly these sizes, order kept."""
    held: list[Batch] = []
    wanted = iter(sizes)
    size = next(wanted, None)
    for block in blocks:
        held.append(block)
        while size is not None and sum(len(b["key"]) for b in held) >= size:
            whole = held[0] if len(held) == 1 else _concatenate(held)
            yield {name: column[:size] for name, column in whole.items()}
            rest = {name: column[size:] for name, column in whole.items()}
            held = [rest] if len(rest["key"]) else []
            size = next(wanted, None)


def _concatenate(blocks: list[Batch]) -> Batch:
    return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
