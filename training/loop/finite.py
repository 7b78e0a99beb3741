"""FiniteSteps: the optimiser's step, taken only while loss and gradients are finite.

Knows nothing of how they came about. Invariants: when `NonFiniteLoss` is raised, the weights are
those before the step that was not finite; the host waits for no step but the one before;
ranks tell each other nothing of a step that is finite.

Shapes: n clips of this rank.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

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
    outputs: tuple[Tensor, ...]
    """What the model made of the clips, each [n, ...]; detached."""


_MEND_FEATURES = (
    "Lower rates do not help: let diccae store verify --repair --sample N, N as many as the store "
    "has clips, forget such features, ingest again, and start with a new --out."
)


class FiniteSteps:
    """Takes steps of an optimiser.

    Args: keep: saves a failed step for replay and returns where it is. clip_ids_N: of the index
        that positions of a batch are in. state: the trainer's, asked for on a failure and kept by
        rank 0. way_on: what to do then, with `{weights}` for where that is.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip_ids_N: np.ndarray,
        world: World,
        *,
        keep: Callable[[dict[str, Any]], str],
        state: Callable[[], dict[str, Any]],
        way_on: str,
    ) -> None:
        self.optimizer, self.clip_ids_N, self.world = optimizer, clip_ids_N, world
        self.keep, self.state, self.way_on = keep, state, way_on
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

    def _fail(self, taken: StepTaken) -> NoReturn:
        """On all ranks alike: gradients are one sum, so what is not finite in one is so in all."""
        state = self.state()  # Collective; as large on every rank, so one of them keeps it.
        content = {
            "step": taken.step,
            "rank": self.world.rank,
            "clip_ids": self.clip_ids_N[taken.batch.position].tolist(),
            # torch has few operations on uint64; the bits are the same.
            "batch": {
                name: torch.from_numpy(np.array(x.view(np.int64) if x.dtype == np.uint64 else x))
                for name, x in taken.batch._asdict().items()
            },
        }
        where = self.keep(content | ({"state": state} if self.world.rank == 0 else {}))
        ranks = self.world.gathered(_Failed.of(where, content["clip_ids"], taken))
        raise NonFiniteLoss(_told(taken.step, ranks, self.way_on))


class _Failed(NamedTuple):
    """A step that failed, as one rank saw it."""

    where: str
    clip_ids: list[str]
    loss: float
    norm: float
    unread: list[str]
    """Clips whose features are not finite."""
    unmade: list[str]
    """Clips of which the model made something that is not finite."""

    @classmethod
    def of(cls, where: str, clip_ids: list[str], taken: StepTaken) -> "_Failed":
        """Looked at now: while steps are finite nothing is."""
        read_n = torch.from_numpy(np.isfinite(taken.batch.fbank).all((1, 2)))
        made_n = torch.ones_like(read_n)
        for x in taken.outputs:
            made_n &= torch.isfinite(x).flatten(1).all(1).cpu()
        ids_n = np.array(clip_ids)
        unread, unmade = (ids_n[~finite_n.numpy()].tolist() for finite_n in (read_n, made_n))
        return cls(where, clip_ids, float(taken.loss), float(taken.norm), unread, unmade)


def _told(step: int, ranks: list[_Failed], way_on: str) -> str:
    """The same on every rank, whichever is heard."""
    unread = {rank: failed.unread for rank, failed in enumerate(ranks) if failed.unread}
    unmade = {rank: failed.unmade for rank, failed in enumerate(ranks) if failed.unmade}
    everyone = {rank: failed.clip_ids for rank, failed in enumerate(ranks)}
    if unread:
        guilty, why, way_on = unread, "features that are not finite", _MEND_FEATURES
    elif unmade and unmade != everyone:
        guilty, why = unmade, "outputs of the model that are not finite"
    else:
        guilty, why = everyone, "no clip at fault alone"
    first = ranks[min(guilty)]
    clips = "; ".join(f"rank {rank}: {_some(ids)}" for rank, ids in guilty.items())
    beside = ", the batches of other ranks beside it" if len(ranks) > 1 else ""
    return (
        f"step {step}: loss {first.loss}, gradient norm {first.norm}; {why}, of {clips}. "
        f"The step is saved in {ranks[0].where} for replay{beside}. "
        + way_on.format(weights=ranks[0].where)
    )


def _some(clip_ids: list[str]) -> str:
    return ", ".join(clip_ids[:8]) + (", ..." if len(clip_ids) > 8 else "")


class _Watched(NamedTuple):
    """A step that is queued, whose outcome is on its way."""

    taken: StepTaken
    broken: HostCopy
