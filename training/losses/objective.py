"""LOSS_TERMS, the table of all terms of the pretraining loss, and the pass that feeds them.

Pure modules: knows nothing of steps, schedules, stores or Ray. The pass and the loss are apart, so
that a large batch can run as chunks with the same gradient (cached gradients, Gao et al. 2021,
arXiv 2101.06983). Invariant: what is computed is a function of the views and the labels alone.
A new term is a function in `terms`, a weight in LossConfig and one entry here: the loss, its
metrics, their curves and the ablation's warm-up read the table.

Shapes: n clips of a chunk, B of this rank, D token width, P projection, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from training.config import SIDES, STREAMS, LossConfig, Stream
from training.data.views import View
from training.losses.confusion import ConfusionState
from training.losses.gather import RankShare
from training.losses.terms import (
    class_alignment,
    confusion_loss,
    info_nce,
    intra_modal,
    labelled_rows,
)
from training.model.encoder import Encoder, Encoding, MaskNoise


class Embeddings(NamedTuple):
    """What a pass makes of its clips, by stream."""

    second: dict[str, Tensor]
    """[B, D or P], of the second view, in the space L_intra compares; empty without one."""
    z: dict[str, Tensor]
    """[B, D], means over tokens."""
    h: dict[str, Tensor]
    """[B, P], of the class heads, unit norm."""

    def of(self, space: Literal["z", "h"]) -> dict[str, Tensor]:
        """The first view's, in a space."""
        return self.z if space == "z" else self.h

    def tensors(self) -> list[Tensor]:
        """All of them, always in the same order: that of sums decides the bits of gradients."""
        return [x for part in self for x in part.values()]

    def leaves(self) -> "Embeddings":
        """Detached copies that collect a gradient."""
        return Embeddings(
            *({s: x.detach().requires_grad_() for s, x in part.items()} for part in self)
        )

    @classmethod
    def joined(cls, chunks: "Sequence[Embeddings]") -> "Embeddings":
        """Those of the chunks' clips, one after the other."""
        return cls(
            *(
                {s: torch.cat([part[s] for part in parts]) for s in parts[0]}
                for parts in zip(*chunks, strict=True)
            )
        )


class Phase(NamedTuple):
    """What a step computes; changes when the warm-up ends and when the first labels arrive."""

    intra: bool
    """Two views and L_intra."""
    labelled: bool
    """Pseudo-labels are in force: L_cls and L_conf, on the fusion stream too if it takes part."""
    fusion: bool
    """The fusion stream is computed (for labels, or because its features go to the bank)."""

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Streams of the pass."""
        return STREAMS if self.fusion else SIDES


class Labels(NamedTuple):
    """One clustering in force, and what it says of some clips of this rank."""

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
        second: dict[str, Tensor] = {}
        if phase.intra and not reconstruct:
            # Both views in one pass: half the launches, the same numbers.
            n = len(first.fbank_nTM)
            both = View(*(torch.cat(parts) for parts in zip(*views, strict=True)))
            encoding = self.encoder(both.fbank_nTM, both.frames_nFCHW, phase.streams)
            compared = self._compared(encoding)
            second = {s: compared[s][n:] for s in SIDES}
            z = {s: x[:n] for s, x in encoding.z.items()}
            h = {s: x[:n] for s, x in encoding.h.items()}
        else:
            encoding = self.encoder(*first, phase.streams, masks, reconstruct=reconstruct)
            z, h = encoding.z, encoding.h
            if phase.intra:
                compared = self._compared(self.encoder(*views[1], SIDES, masks))
                second = {s: compared[s] for s in SIDES}
        zero = z["audio"].new_zeros(())
        return Embeddings(second, z, h), sum(encoding.reconstruction.values(), zero)

    def _compared(self, encoding: Encoding) -> dict[str, Tensor]:
        return encoding.z if self.loss.instance_on == "z" else encoding.h

    def set_phase(self, phase: Phase) -> None:
        """Freeze what no loss of this phase reaches, so that DDP expects only real gradients."""
        learns = phase.labelled and self.loss.fusion
        with_fusion = learns or self.loss.reconstruction > 0
        self.encoder.train_only(STREAMS if with_fusion else SIDES)
        heads = self.encoder.class_heads
        for stream in SIDES:
            heads[stream].requires_grad_(phase.labelled or self.loss.instance_on != "z")
        heads["fusion"].requires_grad_(learns)


class LossInputs(NamedTuple):
    """What a term is computed from: this rank's clips."""

    embeddings: Embeddings
    labels: list[Labels]
    """By clustering head; empty before the first labels."""
    rows: list[Tensor]
    """`labelled_rows` of each head."""
    config: LossConfig
    share: RankShare | None

    @property
    def space(self) -> Literal["z", "h"]:
        """The embeddings that two views, and the accuracy, are compared in."""
        return "z" if self.config.instance_on == "z" else "h"

    def h(self) -> dict[str, Tensor]:
        """Class-head embeddings of the streams that learn from labels."""
        return {s: self.embeddings.h[s] for s in self.config.label_streams}


class TermValue(NamedTuple):
    """A term of one batch."""

    loss: Tensor
    """Scalar, connected to the embeddings, before its weight."""
    metrics: dict[str, Tensor]
    """What else it knows, detached, by metric name."""
    posteriors: list[Tensor]
    """[B, K] per clustering head, if the term computes them."""


class LossTerm(NamedTuple):
    """One line of the loss."""

    metric: str
    """Its name in metrics.jsonl and MLflow."""
    weight: str
    """Field of LossConfig that multiplies it."""
    needs: Literal["pair", "second_view", "labels", "pass"]
    """`pair`: always there; `second_view`, `labels`: computed in the phases that have them;
    `pass`: the encoder's pass makes it, and the trainer weighs it chunk by chunk."""
    value: Callable[[LossInputs], TermValue] | None
    """None with `pass`."""
    settings: tuple[str, ...] = ()
    """Further fields of LossConfig that nothing but this term and its like read."""


def _instance(given: LossInputs) -> TermValue:
    config = given.config
    contrasts = [
        info_nce(
            given.embeddings.of(space)["audio"],
            given.embeddings.of(space)["video"],
            config.temperature,
            config.instance_direction,
            config.negatives,
            given.share,
        )
        for space in (("z", "h") if config.instance_on == "both" else (config.instance_on,))
    ]
    loss = torch.stack([c.loss for c in contrasts]).mean()
    # Of the last space: the class heads', where both are compared.
    return TermValue(loss, {"accuracy_instance": contrasts[-1].accuracy}, [])


def _intra(given: LossInputs) -> TermValue:
    config = given.config
    second = given.embeddings.second
    first = {s: given.embeddings.of(given.space)[s] for s in second}
    loss = intra_modal(first, second, config.temperature, config.negatives, given.share)
    return TermValue(loss, {}, [])


def _class_alignment(given: LossInputs) -> TermValue:
    h, tau = given.h(), given.config.class_temperature
    losses = [
        class_alignment(h, head.prototypes, head.labels_B, tau, head.teaches, rows=rows)
        for head, rows in zip(given.labels, given.rows, strict=True)
    ]
    return TermValue(torch.stack(losses).mean(), {}, [])


def _confusion(given: LossInputs) -> TermValue:
    """L_conf, the mean over clustering heads, each by its degree of confusion."""
    h, tau = given.h(), given.config.class_temperature
    losses, posteriors = [], []
    for head, rows in zip(given.labels, given.rows, strict=True):
        state = head.confusion
        term = confusion_loss(
            h, head.prototypes, head.labels_B, tau, state.weights_KK, head.teaches, rows=rows
        )
        by_degree = state.mean_offdiagonal if state.config.share_by_degree else 1.0
        losses.append(by_degree * term.loss)
        posteriors.append(term.posteriors_BK)
    return TermValue(torch.stack(losses).mean(), {}, posteriors)


LOSS_TERMS: tuple[LossTerm, ...] = (
    LossTerm("loss_instance", "instance", "pair", _instance),
    LossTerm("loss_intra", "intra", "second_view", _intra),
    LossTerm(
        "loss_class_alignment",
        "class_alignment",
        "labels",
        _class_alignment,
        ("class_temperature", "fusion"),
    ),
    LossTerm("loss_confusion", "confusion", "labels", _confusion),
    LossTerm("loss_reconstruction", "reconstruction", "pass", None),
)
"""In the order in which they are added."""


def settings_after_labels() -> tuple[str, ...]:
    """Fields of LossConfig that change nothing before the first labels."""
    after = [term for term in LOSS_TERMS if term.needs == "labels"]
    return tuple(name for term in after for name in (term.weight, *term.settings))


class Total(NamedTuple):
    """The loss of a batch and its parts."""

    loss: Tensor
    """Scalar; connected to every embedding a loss of the phase uses."""
    parts: dict[str, Tensor]
    """Detached scalars by metric name."""
    posteriors: list[Tensor]
    """[B, K] per clustering head, for the confusion matrices."""


def total_loss(
    embeddings: Embeddings,
    labels: list[Labels],
    config: LossConfig,
    share: RankShare | None = None,
) -> Total:
    """Weighted sum over this rank's rows of every term but those of the pass (docs/method.md).

    Its mean over ranks is the loss of the global batch. Args: share: see `info_nce`.
    """
    # Once for all terms: it is a collective call.
    rows = [labelled_rows(head.labels_B) for head in labels]
    given = LossInputs(embeddings, labels, rows, config, share)
    there = {"pair": True, "second_view": bool(embeddings.second), "labels": bool(labels)}
    loss: Tensor | None = None
    parts: dict[str, Tensor] = {}
    posteriors: list[Tensor] = []
    for term in LOSS_TERMS:
        if term.value is None or not there[term.needs]:
            continue
        found = term.value(given)
        weighted = getattr(config, term.weight) * found.loss
        loss = weighted if loss is None else loss + weighted
        parts |= {term.metric: found.loss.detach()}
        parts |= {name: x.detach() for name, x in found.metrics.items()}
        posteriors += found.posteriors
    assert loss is not None, "one term needs nothing but the pair"
    return Total(loss, parts, posteriors)
