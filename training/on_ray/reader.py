"""RayReader: batches decoded ahead of training, by Ray tasks.

The edge of reading to Ray: knows nothing of what a window holds. Invariant: it gives the batches of
`LocalReader`, whatever the number of tasks and whichever of them die.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.store.cached import ShardCache
from training.data.order import EpochReads, FrameDraw, Window, WindowPlan
from training.data.reader import Batch, read_window

_STEPS_AHEAD = 4
"""Decoded steps a task holds that training has not taken yet."""


@dataclass
class _Started:
    """A window that a task decodes or has decoded."""

    task: Any
    left: int
    """Steps that training has not taken yet."""


class RayReader:
    """Decodes windows in Ray tasks, ahead of training.

    Plain tasks and not a Ray Data set: iterated in a Ray Train worker on two cores, its scheduler
    never rested, and the same pretraining ran at a third of the speed (benchmarks/README.md). It
    also wants every window of all epochs beforehand.
    """

    def __init__(
        self, windows: WindowPlan, tasks: int, cpus: float, cache: ShardCache | None = None
    ) -> None:
        """Args: tasks: windows decoded at the same time; cpus: what each of them reserves; cache:
        of whichever node a task runs on, see `read_window`."""
        self.windows, self.tasks, self.cache = windows, tasks, cache
        # Processes for them start and import beside what the worker does before its first step.
        begin = ray.remote(_import).options(
            name="read", num_cpus=cpus, scheduling_strategy="DEFAULT"
        )
        for _ in range(tasks):
            begin.remote()
        self._decode = ray.remote(read_window).options(
            name="read",
            num_cpus=cpus,
            num_returns="streaming",
            max_retries=-1,
            scheduling_strategy="DEFAULT",
            _generator_backpressure_num_objects=_STEPS_AHEAD,
        )

    def stream(self, epochs: Iterable[EpochReads]) -> Iterator[Batch]:
        """See `Reader`."""
        return self._run(w for reads in epochs for w in self.windows.windows(reads))

    def sweep(self, frames: FrameDraw) -> Iterator[Batch]:
        """See `Reader`."""
        return self._run(self.windows.sweep(frames))

    def _run(self, windows: Iterator[Window]) -> Iterator[Batch]:
        started: deque[_Started] = deque()
        try:
            while True:
                while self._may_start(started) and (window := next(windows, None)):
                    task = self._decode.remote(window, self.cache)
                    started.append(_Started(task, len(window.places_Sn)))
                if not started:
                    return
                step = next(started[0].task, None)
                if step is None:
                    started.popleft()
                else:
                    started[0].left -= 1
                    yield ray.get(step)
        finally:
            for each in started:
                ray.cancel(each.task)

    def _may_start(self, started: Iterable[_Started]) -> bool:
        """Whether there is room for one more window."""
        # A window of few steps ends without waiting for training: tasks alone are no bound.
        ahead = sum(min(window.left, _STEPS_AHEAD) for window in started)
        if ahead >= self.tasks * _STEPS_AHEAD:
            return False
        # Never more tasks than CPUs were reserved for: one that has to be run again would wait
        # behind a later one, which waits for it to be read.
        return _n_running(window.task for window in started) < self.tasks


def _import() -> None:
    """What a process imports to run this is what reading needs."""


def _n_running(tasks: Iterable[Any]) -> int:
    """Tasks that have not decoded all of their window yet."""
    ends = [task.completed() for task in tasks]
    return len(ray.wait(ends, num_returns=len(ends), timeout=0)[1]) if ends else 0
