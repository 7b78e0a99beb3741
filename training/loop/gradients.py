"""Gradients: forward and backward of one pretraining batch, whole or in chunks.

Knows nothing of optimisers, of when labels change or of how clips are read. Invariant: chunks have
the gradient of the whole batch (cached gradients, Gao et al. 2021, arXiv 2101.06983).

Shapes: B clips of this rank, n of a chunk.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.config import TrainingConfig
from training.data.views import Chunk
from training.loop.hooks import World
from training.loop.meter import Meter
from training.losses.gather import RankShare
from training.losses.objective import Embeddings, Labels, Phase, PretrainPass, Total, total_loss
from training.model.encoder import Encoder
from training.model.numerics import trunk_numerics


class StepLoss(NamedTuple):
    """What a batch gave, its gradients left in the weights."""

    embeddings: Embeddings
    total: Total
    reconstruction: Tensor
    """L_rec of this rank's clips before its weight; zero without a decoder."""


class Gradients:
    """The encoder as pretraining differentiates it."""

    def __init__(
        self,
        config: TrainingConfig,
        encoder: Encoder,
        world: World,
        share: RankShare,
        meter: Meter,
    ) -> None:
        self.config, self.world, self.share, self.meter = config, world, share, meter
        self.module = PretrainPass(encoder, config.loss)
        self.wrapped: nn.Module = self.module
        self.phase: Phase | None = None
        # By the largest share, for all ranks: DDP has collectives of its own in a forward pass,
        # which lies before the loss's gathers in one way and after them in the other.
        micro_batch = config.pretrain.micro_batch
        self.in_chunks = micro_batch is not None and max(share.rows_W) > micro_batch

    def enter(self, phase: Phase) -> None:
        """Freeze and thaw at the start of a phase, and wrap anew for DDP."""
        if phase == self.phase:
            return
        self.phase = phase
        self.module.set_phase(phase)
        self.wrapped = self.world.wrapped(self.module)

    def of(self, chunks: list[Chunk], labels: list[Labels]) -> StepLoss:
        """Add the batch's gradients to the weights'. Collective."""
        return self._cached(chunks, labels) if self.in_chunks else self._whole(chunks[0], labels)

    def _numerics(self) -> contextlib.AbstractContextManager[None]:
        return trunk_numerics(self.config.pretrain, self.world.device)

    def _whole(self, chunk: Chunk, labels: list[Labels]) -> StepLoss:
        with self.meter.computed("forward"), self._numerics():
            embeddings, reconstruction = self.wrapped(chunk.views, self.phase, chunk.masks)
        with self.meter.computed("loss"):
            reconstruction = reconstruction * self.share.weight
            total = total_loss(embeddings, labels, self.config.loss, self.share)
        with self.meter.computed("backward"):
            (total.loss + self.config.loss.reconstruction * reconstruction).backward()
        return StepLoss(embeddings, total, reconstruction.detach())

    def _cached(self, chunks: list[Chunk], labels: list[Labels]) -> StepLoss:
        """Embed all chunks without a graph, take the loss's gradient on the embeddings, then run
        each chunk again with it."""
        with self.meter.computed("forward"), torch.no_grad(), self._numerics():
            parts = [self.module(chunk.views, self.phase, chunk.masks)[0] for chunk in chunks]
        leaves = Embeddings.joined(parts).leaves()
        with self.meter.computed("loss"):
            total = total_loss(leaves, labels, self.config.loss, self.share)
        with self.meter.computed("backward"):
            total.loss.backward()
            reconstruction = self._replay(chunks, leaves)
        return StepLoss(leaves, total, reconstruction)

    def _replay(self, chunks: list[Chunk], leaves: Embeddings) -> Tensor:
        weight = self.config.loss.reconstruction
        n_rows = len(leaves.z["audio"])
        reconstruction = leaves.z["audio"].new_zeros(())
        start = 0
        for i, chunk in enumerate(chunks):
            # Gradients of ranks are averaged once, with the last chunk.
            quiet = contextlib.nullcontext() if i == len(chunks) - 1 else _no_sync(self.wrapped)
            with quiet:
                with self._numerics():
                    embeddings, error = self.wrapped(chunk.views, self.phase, chunk.masks)
                n = len(embeddings.z["audio"])
                share = n / n_rows * self.share.weight
                surrogate = weight * share * error
                for x, leaf in zip(embeddings.tensors(), leaves.tensors(), strict=True):
                    if leaf.grad is not None and x.requires_grad:
                        surrogate = surrogate + (x * leaf.grad[start : start + n]).sum()
                surrogate.backward()
            reconstruction = reconstruction + share * error.detach()
            start += n
        return reconstruction


def _no_sync(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
