"""FeaturePush: embeddings of training steps to the feature bank, without stopping the device.

Knows nothing of when rounds start. Invariant: rows reach the bank in the order of their steps; all
of them have after `settle`.

Shapes: B clips of a step, W width of a bank row.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clustering.rounds.protocol import Rounds


class _Copying(NamedTuple):
    keys_B: NDArray[np.uint64]
    rows_BW: Tensor
    """float16 in pinned memory, there once `arrived` has been passed."""
    step: int
    arrived: torch.cuda.Event


class FeaturePush:
    """Pushes to `rounds`; from a GPU one step late, when the copy of its rows has long arrived."""

    def __init__(self, rounds: Rounds, device: torch.device) -> None:
        self.rounds, self.device = rounds, device
        self.copying: _Copying | None = None
        self._dropped = 0

    def add(self, keys_B: NDArray[np.uint64], rows_BW: Tensor, step: int) -> None:
        """Hand over rows, any float type."""
        half_BW = rows_BW.detach().half()
        if self.device.type != "cuda":
            self.rounds.push(keys_B, half_BW.cpu().numpy(), step)
            return
        host_BW = torch.empty(half_BW.shape, dtype=torch.float16, pin_memory=True)
        host_BW.copy_(half_BW, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.settle()
        self.copying = _Copying(keys_B, host_BW, step, arrived)

    def settle(self) -> None:
        """Push what is still being copied."""
        if self.copying is None:
            return
        self.copying.arrived.synchronize()
        self.rounds.push(self.copying.keys_B, self.copying.rows_BW.numpy(), self.copying.step)
        self.copying = None

    def flush(self, timeout_s: float) -> None:
        """Return when all rows are in the bank. Raises: RoundTimeout."""
        self.settle()
        self.rounds.flush(timeout_s)

    def newly_dropped(self) -> int:
        """Rows of this worker that were dropped, since the last call, because the bank was slow."""
        before, self._dropped = self._dropped, self.rounds.stats().dropped
        return self._dropped - before
