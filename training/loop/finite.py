"""FiniteSteps: the optimiser's step, taken only while loss and gradients are finite.

Knows nothing of how they came about. Invariants: when `NonFiniteLoss` is raised, the weights are
those before the step that was not finite; the host waits for no step but the one before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.data.device import HostCopy
from training.data.reader import Batch
from training.errors import NonFiniteLoss
from training.loop.hooks import World


class StepTaken(NamedTuple):
    """A step whose gradients are ready."""

    step: int
    batch: Batch
    loss: Tensor
    """Scalar, detached."""
    norm: Tensor
    """Scalar, of all gradients before clipping."""


class FiniteSteps:
    """Takes steps of an optimiser.

    Args: keep: saves a failed step for replay and returns where it is. clip_ids_N: of the index
        that positions of a batch are in. state: the trainer's state, asked for on a failure.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip_ids_N: np.ndarray,
        world: World,
        *,
        keep: Callable[[dict[str, Any]], str],
        state: Callable[[], dict[str, Any]],
    ) -> None:
        self.optimizer, self.clip_ids_N, self.world = optimizer, clip_ids_N, world
        self.keep, self.state = keep, state
        self.broken = torch.zeros((), device=world.device)
        self.last: _Watched | None = None

    def take(self, taken: StepTaken) -> None:
        """Step, or raise NonFiniteLoss; where the host runs ahead, for the step before this one."""
        finite = torch.isfinite(taken.loss + taken.norm)
        if not self.world.runs_ahead:
            if not finite:
                self._fail(taken)
            self.optimizer.step()
            return
        # Stays 1 once a step failed: those queued behind it must leave the weights alone too.
        self.broken = torch.maximum(self.broken, 1.0 - finite.float())
        # The fused kernel looks at it on the device and skips its update. Were it read here, the
        # host would wait in every step until the device has caught up, and the device then for it.
        self.optimizer.found_inf = self.broken  # type: ignore[attr-defined]
        self.optimizer.step()
        before, self.last = self.last, _Watched(taken, HostCopy(self.broken))
        self._judge(before)

    def settle(self) -> None:
        """Wait until the last step is known to be finite."""
        last, self.last = self.last, None
        self._judge(last)

    def _judge(self, watched: "_Watched | None") -> None:
        if watched is not None and bool(watched.broken.wait()):
            self._fail(watched.taken)

    def _fail(self, taken: StepTaken) -> None:
        batch = taken.batch
        clip_ids = self.clip_ids_N[batch.position].tolist()
        where = self.keep(
            {
                "step": taken.step,
                "rank": self.world.rank,
                "clip_ids": clip_ids,
                "state": self.state(),
                "batch": {
                    # torch has few operations on uint64; the bits are the same.
                    name: torch.from_numpy(
                        np.array(x.view(np.int64) if x.dtype == np.uint64 else x)
                    )
                    for name, x in batch._asdict().items()
                },
            }
        )
        raise NonFiniteLoss(
            f"step {taken.step}, rank {self.world.rank}: loss {float(taken.loss)}, gradient norm "
            f"{float(taken.norm)}; clips {', '.join(clip_ids[:8])}, ... The step is saved in "
            f"{where} for replay. A lower optim.lr or optim.clip_norm usually helps."
        )


class _Watched(NamedTuple):
    """A step that is queued, whose outcome is on its way."""

    taken: StepTaken
    broken: HostCopy
