"""Batches in the planned order, decoded ahead of training.

`LocalReader` decodes in this process; `RayReader` runs the same function as Ray tasks.
Invariant: both give the same batches, whatever the number of tasks, and start at any step.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from training.data.batches import Batch, BatchPlan, RowIndex, Views, WindowReader, epoch_order

_STEPS_AHEAD = 4
"""Decoded steps a task holds that training has not taken yet."""


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
    """Decodes windows in Ray tasks, ahead of training.

    Plain tasks and not a Ray Data set: iterated in a Ray Train worker on two cores, its scheduler
    never rested, and the same pretraining ran at a third of the speed (benchmarks/README.md). It
    also wants every window of all epochs beforehand.
    """

    def __init__(self, windows: WindowPlan, tasks: int, cpus: float) -> None:
        """Args: tasks: windows decoded at the same time; cpus: what each of them reserves."""
        import ray

        self.plan, self.tasks = windows, tasks
        self._reader = ray.put(WindowReader(windows.index, windows.seed))
        self._decode = ray.remote(_decode_window).options(
            name="read",
            num_cpus=cpus,
            num_returns="streaming",
            max_retries=-1,
            scheduling_strategy="DEFAULT",
            _generator_backpressure_num_objects=_STEPS_AHEAD,
        )

    def stream(self, epochs: Iterable[EpochReads]) -> Iterator[Batch]:
        """See `Reader`."""
        return self._run(w for reads in epochs for w in self.plan.windows(reads))

    def sweep(self, views: Views) -> Iterator[Batch]:
        """See `Reader`."""
        return self._run(self.plan.sweep(views))

    def _run(self, windows: Iterator[Window]) -> Iterator[Batch]:
        import ray

        started: deque[Any] = deque()
        try:
            while True:
                # Never more tasks than CPUs were reserved for: one that has to be run again would
                # wait behind a later one, which waits for it to be read.
                while _n_running(started) < self.tasks and (window := next(windows, None)):
                    started.append(self._decode.remote(self._reader, window))
                if not started:
                    return
                step = next(started[0], None)
                if step is None:
                    started.popleft()
                else:
                    yield ray.get(step)
        finally:
            for task in started:
                ray.cancel(task)


def _n_running(tasks: Iterable[Any]) -> int:
    """Tasks that have not decoded all of their window yet."""
    import ray

    ends = [task.completed() for task in tasks]
    return len(ray.wait(ends, num_returns=len(ends), timeout=0)[1]) if ends else 0


def _decode_window(reader: WindowReader, window: Window) -> Iterator[Batch]:
    """The steps of one window."""
    yield from reader.read(window.positions_SVb, window.views, window.epoch)
