"""Embeddings of all ranks, with their gradient, and what else ranks tell each other.

Knows nothing of losses. Invariant: with each rank's loss over its own rows against the gathered
ones times its `RankShare.weight`, and gradients averaged over ranks (DDP), W ranks have the
gradient of one process on the whole batch. A gather without gradient gives the same loss and
another gradient.

Shapes: B rows of this rank, W ranks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class RankShare(NamedTuple):
    """The rows of a global batch that a rank holds; ranks may hold different numbers."""

    rows_W: tuple[int, ...]
    rank: int
    lane_size: int | None = None
    """Clips of a data lane, of which every rank holds whole ones; None: all its rows are one."""
    timed: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Around each gather and its backward, to measure what waiting for other ranks costs."""

    @property
    def first(self) -> int:
        """Position of this rank's first row in the global batch."""
        return sum(self.rows_W[: self.rank])

    @property
    def weight(self) -> float:
        """What a mean over this rank's rows counts in the mean over ranks; 1 for equal shares."""
        return self.rows_W[self.rank] * len(self.rows_W) / sum(self.rows_W)


def equal_share(n_rows: int) -> RankShare:
    """The share of this rank when every rank holds `n_rows`."""
    rank, n_ranks = world()
    return RankShare((n_rows,) * n_ranks, rank)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: RankShare) -> Tensor:
        ctx.share, ctx.rows = share, slice(share.first, share.first + len(x))
        most = max(share.rows_W)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        gathered = x.new_empty(len(share.rows_W) * most, *x.shape[1:])
        dist.all_gather_into_tensor(gathered, padded)
        pieces = gathered.split(most)
        return torch.cat([piece[:n] for piece, n in zip(pieces, share.rows_W, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        with ctx.share.timed():
            dist.all_reduce(gradient)
        return gradient[ctx.rows], None


def gather_with_grad(x: Tensor, share: RankShare | None = None) -> Tensor:
    """Rows of every rank, in rank order: [B, ...] -> [sum of B, ...]; identity on one rank.

    Collective. Backward sums the gradients of all ranks. Args: share: None for equal shares.
    """
    if world()[1] == 1:
        return x
    share = share or equal_share(len(x))
    with share.timed():
        # torch leaves `Function.apply` untyped.
        gathered: Tensor = _Gather.apply(x, share)  # type: ignore[no-untyped-call]
    return gathered


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a detached tensor over ranks, the same bits on each; collective."""
    n_ranks = world()[1]
    if n_ranks == 1:
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / n_ranks


def of_every_rank(x: Tensor) -> Tensor:
    """What each rank holds, detached: [...] -> [W, ...]; collective."""
    x = x.detach().contiguous()
    n_ranks = world()[1]
    if n_ranks == 1:
        return x[None].clone()
    gathered = x.new_empty(n_ranks * x.numel())
    dist.all_gather_into_tensor(gathered, x.flatten())
    return gathered.view(n_ranks, *x.shape)


def of_this_rank(x_W: Tensor) -> Tensor:
    """This rank's part of `of_every_rank`; the mean of all parts if there are now other ranks."""
    rank, n_ranks = world()
    return x_W[rank] if len(x_W) == n_ranks else x_W.mean(0)
