"""World and Hooks: what a training loop knows of its peers, and what it tells its surroundings.

Knows nothing of what is trained. Invariant: every rank calls a collective hook at the same step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class World(NamedTuple):
    """This worker among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def runs_ahead(self) -> bool:
        """Whether the host queues work for the device instead of doing it: it then learns of a
        step's outcome one step late, and never waits for the device in between."""
        return self.device.type == "cuda"

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.size > 1:
            dist.barrier()

    def gathered(self, own: Any) -> list[Any]:
        """What each worker gave, by rank; pickled, so for little and seldom."""
        if self.size == 1:
            return [own]
        all_W: list[Any] = [None] * self.size
        dist.all_gather_object(all_W, own)
        return all_W

    def wrapped(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over workers; itself for a single one."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)


class Hooks(NamedTuple):
    """What a loop tells its surroundings."""

    log: Callable[[int, dict[str, float]], None]
    """(step, metrics), on rank 0."""
    save: Callable[[dict[str, Any]], None]
    """A checkpoint, on every rank at the same step."""
    failed: Callable[[dict[str, Any]], str]
    """What to keep of a step whose loss is not finite; returns where it is."""
    leaving: Callable[[], bool] = lambda: False
    """Whether a node has just been announced to go; asked by every rank at each log."""
