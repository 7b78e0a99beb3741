"""Edge: what a loop is given by the place it runs in, a Ray worker or a process of one machine.

Knows nothing of what is trained. Invariant: two edges of the same peers, clips and checkpoint give
the same weights, bit for bit on a CPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pipeline.storage import Location
from training.attempt import Attempt
from training.data.order import WindowPlan
from training.data.reader import Reader
from training.loop.hooks import World
from training.tracking.tracker import Tracker


class Edge(NamedTuple):
    """One worker's surroundings."""

    world: World
    reader: Callable[[WindowPlan], Reader]
    state: dict[str, Any] | None
    """The newest checkpoint of this run, if there is one."""
    save: Callable[[dict[str, Any]], None]
    """Keeps a checkpoint; called by all workers at the same step."""
    leaving: Callable[[], bool] = lambda: False
    """See `Hooks.leaving`."""


class Written(NamedTuple):
    """Where a run is written down."""

    out: Location
    provenance: dict[str, Any]
    attempt: Attempt

    def tracker(
        self, lines: str, edge: Edge, state: dict[str, Any] | None, prefix: str = ""
    ) -> Tracker | None:
        """Rank 0's tracker, from the step of the checkpoint on; None on all others.

        Args: lines: its file in the run folder. prefix: see `Tracker`.
        """
        if edge.world.rank != 0:
            return None
        step = 0 if state is None else int(state["step"])
        path = self.out.uri_of(lines)
        return Tracker(path, step, attempt=self.attempt, prefix=prefix)


@contextlib.contextmanager
def kept(tracker: Tracker | None) -> Iterator[None]:
    """A block whose metrics are in the run folder also where it fails: they say why."""
    try:
        yield
    except Exception:
        if tracker is not None:
            tracker.publish()
        raise
