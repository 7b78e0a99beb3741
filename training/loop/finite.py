"""FiniteSteps: the optimiser's step, taken only while loss and gradients are finite.

Knows nothing of how they came about. Invariant: when `NonFiniteLoss` is raised, the weights are
those before the step that was not finite.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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
        self.watch = _LateWatch(world.device) if world.device.type == "cuda" else None

    def take(self, taken: StepTaken) -> None:
        """Step, or raise NonFiniteLoss; on a GPU for the step before, if that was not finite."""
        finite = torch.isfinite(taken.loss + taken.norm)
        if self.watch is None:
            if not finite:
                self._fail(taken)
            self.optimizer.step()
            return
        # The fused kernel skips its update while `found_inf` is 1 and looks at it on the device;
        # reading it here would stop the host until the device has caught up, in every step.
        self.optimizer.found_inf = self.watch.note(finite)  # type: ignore[attr-defined]
        self.optimizer.step()
        if failed := self.watch.failed_before(taken):
            self._fail(failed)

    def settle(self) -> None:
        """Wait until the last step is known to be finite."""
        if self.watch is not None and (failed := self.watch.failed_before(None)):
            self._fail(failed)

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


class _LateWatch:
    """Learns of a step on the device while the next one is already queued.

    So the device always has work, and the host is never more than one step ahead of it.
    """

    def __init__(self, device: torch.device) -> None:
        # Stays 1 once a step failed: the steps queued behind it must leave the weights alone too.
        self.broken = torch.zeros(1, device=device)
        self.last: tuple[StepTaken, Tensor, torch.cuda.Event] | None = None
        self.noted: tuple[Tensor, torch.cuda.Event] | None = None

    def note(self, finite: Tensor) -> Tensor:
        """Add a step's verdict; returns the flag for the optimiser, float32 [1] on the device."""
        self.broken = torch.maximum(self.broken, 1.0 - finite.float().reshape(1))
        copy = torch.empty(1, pin_memory=True)
        copy.copy_(self.broken, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.noted = (copy, arrived)
        return self.broken

    def failed_before(self, taken: StepTaken | None) -> StepTaken | None:
        """The step before `taken` if it was not finite; None means after the last one."""
        before, self.last = self.last, None
        if taken is not None and self.noted is not None:
            self.last = (taken, *self.noted)
        if before is None:
            return None
        step, copy, arrived = before
        arrived.synchronize()
        return step if bool(copy) else None
