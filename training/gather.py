"""Embeddings of all ranks, with their gradient.

Knows nothing of losses. Invariant: with equal rows per rank, each rank using its own rows against
the gathered ones, and gradients averaged over ranks (DDP), W ranks have the gradient of one process
on the whole batch. A gather without gradient gives the same loss and another gradient.

Shapes: B rows of this rank, W ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rank, n_ranks = world()
        ctx.rows = slice(rank * x.shape[0], (rank + 1) * x.shape[0])
        gathered = x.new_empty(n_ranks * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.rows]


def gather_with_grad(x: Tensor) -> Tensor:
    """Rows of every rank, in rank order: [B, ...] -> [W * B, ...]; identity on one rank.

    Collective: every rank calls it with the same shape. Backward sums the gradients of all ranks.
    """
    return x if world()[1] == 1 else _Gather.apply(x)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a detached tensor over ranks, the same bits on each; collective."""
    n_ranks = world()[1]
    if n_ranks == 1:
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / n_ranks
