"""One pretraining pass: views of some clips to embeddings, embeddings to the total loss.

Pure modules: knows nothing of steps, schedules, stores or Ray. The pass and the loss are apart, so
that a large batch can run as chunks with the same gradient (cached gradients, Gao et al. 2021,
arXiv 2101.06983). Invariant: what is computed is a function of the views and the labels alone.

Shapes: n clips of a chunk, B of this rank, D token width, P projection, K classes.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from training.config import STREAMS, LossConfig
from training.data.views import View
from training.losses.confusion import ConfusionState
from training.losses.gather import Share
from training.losses.terms import (
    class_alignment,
    confusion_loss,
    info_nce,
    intra_modal,
    labelled_rows,
)
from training.model.encoder import Encoder, MaskNoise

Embeddings = dict[str, Tensor]
"""`z.audio` [B, D], `h.audio` [B, P], `second.audio` [B, D or P] of the second view, ..."""


class Phase(NamedTuple):
    """What a step computes; changes when the warm-up ends and when the first labels arrive."""

    intra: bool
    """Two views and L_intra."""
    labelled: bool
    """Pseudo-labels are in force: L_cls and L_conf, on the fusion stream too if it takes part."""
    fusion: bool
    """The fusion stream is computed (for labels, or because its features go to the bank)."""

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams of the pass."""
        return STREAMS if self.fusion else STREAMS[:2]


class Labels(NamedTuple):
    """The labels of one clustering head for the clips of this rank."""

    labels_B: Tensor
    """int64, -100 where there is none."""
    prototypes: dict[str, Tensor]
    teaches: tuple[str, ...]
    confusion: ConfusionState


class PretrainPass(nn.Module):
    """The encoder seen as one function from views to named embeddings; what DDP wraps."""

    def __init__(self, encoder: Encoder, loss: LossConfig) -> None:
        super().__init__()
        self.encoder, self.loss = encoder, loss

    def forward(
        self, views: list[View], phase: Phase, masks: MaskNoise | None = None
    ) -> tuple[Embeddings, Tensor]:
        """Embeddings of the clips, and L_rec (a scalar; zero without a decoder)."""
        first = views[0]
        reconstruct = self.loss.reconstruction > 0
        out: Embeddings = {}
        if phase.intra and not reconstruct:
            n = len(first.fbank_nTM)
            both = View(*(torch.cat(parts) for parts in zip(*views, strict=True)))
            encoding = self.encoder(both.fbank_nTM, both.frames_nFCHW, phase.streams)
            second = self._compared(encoding.z, encoding.h)
            out |= {f"second.{s}": second[s][n:] for s in STREAMS[:2]}
            z = {s: x[:n] for s, x in encoding.z.items()}
            h = {s: x[:n] for s, x in encoding.h.items()}
        else:
            encoding = self.encoder(*first, phase.streams, masks, reconstruct=reconstruct)
            z, h = encoding.z, encoding.h
            if phase.intra:
                again = self.encoder(*views[1], STREAMS[:2], masks)
                out |= {f"second.{s}": x for s, x in self._compared(again.z, again.h).items()}
        out |= {f"z.{s}": x for s, x in z.items()} | {f"h.{s}": x for s, x in h.items()}
        zero = z["audio"].new_zeros(())
        return out, sum(encoding.reconstruction.values(), zero)

    def _compared(self, z: dict[str, Tensor], h: dict[str, Tensor]) -> dict[str, Tensor]:
        return z if self.loss.instance_on == "z" else h

    def set_phase(self, phase: Phase) -> None:
        """Freeze what no loss of this phase reaches, so that DDP expects only real gradients."""
        learns = phase.labelled and self.loss.fusion
        with_fusion = learns or self.loss.reconstruction > 0
        self.encoder.train_only(STREAMS if with_fusion else STREAMS[:2])
        heads = self.encoder.class_heads
        for stream in STREAMS[:2]:
            heads[stream].requires_grad_(phase.labelled or self.loss.instance_on != "z")
        heads["fusion"].requires_grad_(learns)


class Total(NamedTuple):
    """The loss of a batch and its parts."""

    loss: Tensor
    """Scalar; connected to every embedding a loss of the phase uses."""
    parts: dict[str, Tensor]
    """Detached scalars by metric name."""
    posteriors: list[Tensor]
    """[B, K] per clustering head, for the confusion matrices."""


def total_loss(
    embeddings: Embeddings, labels: list[Labels], config: LossConfig, share: Share | None = None
) -> Total:
    """Everything but L_rec (DESIGN section 5): weighted sum over this rank's rows.

    Its mean over ranks is the loss of the global batch. Args: share: see `info_nce`.
    """
    spaces: list[Literal["z", "h"]] = (
        ["z", "h"] if config.instance_on == "both" else [config.instance_on]
    )
    contrasts = [
        info_nce(
            embeddings[f"{space}.audio"],
            embeddings[f"{space}.video"],
            config.temperature,
            config.instance_direction,
            config.negatives,
            share,
        )
        for space in spaces
    ]
    instance = torch.stack([c.loss for c in contrasts]).mean()
    loss = config.instance * instance
    parts = {"loss_instance": instance, "accuracy_instance": contrasts[-1].accuracy}
    if "second.audio" in embeddings:
        first: dict[str, Tensor] = {s: embeddings[f"{spaces[-1]}.{s}"] for s in STREAMS[:2]}
        second: dict[str, Tensor] = {s: embeddings[f"second.{s}"] for s in STREAMS[:2]}
        intra = intra_modal(first, second, config.temperature, config.negatives, share)
        loss = loss + config.intra * intra
        parts["loss_intra"] = intra
    posteriors: list[Tensor] = []
    if labels:
        h: dict[str, Tensor] = {s: embeddings[f"h.{s}"] for s in config.label_streams}
        alignment, confusion, posteriors = _class_terms(h, labels, config)
        loss = loss + config.class_alignment * alignment + config.confusion * confusion
        parts |= {"loss_class_alignment": alignment, "loss_confusion": confusion}
    return Total(loss, {name: part.detach() for name, part in parts.items()}, posteriors)


def _class_terms(
    h: dict[str, Tensor], labels: list[Labels], config: LossConfig
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """L_cls and L_conf, each the mean over clustering heads; L_conf by its degree of confusion."""
    alignments, confusions, posteriors = [], [], []
    for head in labels:
        rows = labelled_rows(head.labels_B)
        tau = config.class_temperature
        alignments.append(
            class_alignment(h, head.prototypes, head.labels_B, tau, head.teaches, rows)
        )
        weights_KK = head.confusion.weights_KK
        term = confusion_loss(
            h, head.prototypes, head.labels_B, tau, weights_KK, head.teaches, rows
        )
        by_degree = head.confusion.config.share_by_degree
        share = head.confusion.mean_offdiagonal if by_degree else 1.0
        confusions.append(share * term.loss)
        posteriors.append(term.posteriors_BK)
    return torch.stack(alignments).mean(), torch.stack(confusions).mean(), posteriors
