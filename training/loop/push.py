"""FeaturePush: embeddings of training steps to the feature bank, without stopping the device.

Knows nothing of when rounds start. Invariant: rows reach the bank in the order of their steps; all
of them have after `settle`.

Shapes: B clips of a step, W width of a bank row.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clustering.rounds.protocol import Rounds
from training.data.device import HostCopy
from training.loop.hooks import World


class _Copying(NamedTuple):
    keys_B: NDArray[np.uint64]
    rows_BW: HostCopy
    step: int


class FeaturePush:
    """Pushes to `rounds`; where the host runs ahead, one step late: the rows are there by then."""

    def __init__(self, rounds: Rounds, world: World) -> None:
        self.rounds, self.world = rounds, world
        self._copying: _Copying | None = None
        self._dropped = 0

    def add(self, keys_B: NDArray[np.uint64], rows_BW: Tensor, step: int) -> None:
        """Hand over rows, any float type."""
        next_rows = _Copying(keys_B, HostCopy(rows_BW.detach().half()), step)
        self.settle()
        self._copying = next_rows
        if not self.world.runs_ahead:
            self.settle()

    def settle(self) -> None:
        """Push what is still being copied."""
        if self._copying is None:
            return
        self.rounds.push(
            self._copying.keys_B, self._copying.rows_BW.wait().numpy(), self._copying.step
        )
        self._copying = None

    def forget(self) -> None:
        """Drop what is still being copied: the step it is of failed."""
        self._copying = None

    def flush(self, timeout_s: float) -> None:
        """Return when all rows are in the bank. Raises: RoundTimeout."""
        self.settle()
        self.rounds.flush(timeout_s)

    def newly_dropped(self) -> int:
        """Rows of this worker that were dropped, since the last call, because the bank was slow."""
        before, self._dropped = self._dropped, self.rounds.dropped
        return self._dropped - before
