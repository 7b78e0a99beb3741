"""The terms of the pretraining loss (docs/method.md), one function each.

Pure tensors: knows nothing of encoders, of how labels were made, or of weights between terms.
Invariants: computed in at least float32; rows labelled -100 are ignored, and a batch of only such
rows gives a finite zero that is connected to the graph; the mean over ranks of each loss, and DDP's
mean of its gradients, equal those of one process on the whole batch.

Shapes: B clips of this rank, D or P embedding width, K classes, W ranks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clustering.kmeans.label_table import NO_LABEL
from training.losses.gather import RankShare, equal_share, gather_with_grad, mean_over_ranks, world
from training.model.blocks import full_precision


class Contrast(NamedTuple):
    """An InfoNCE and how often it is right."""

    loss: Tensor
    """Scalar, nats."""
    accuracy: Tensor
    """Share of rows whose positive scores highest, detached."""


def info_nce(
    audio_BD: Tensor,
    video_BD: Tensor,
    temperature: float,
    direction: str,
    negatives: str,
    share: RankShare | None = None,
) -> Contrast:
    """L_inst: each clip's audio finds its own video among all clips, and the other way round.

    -1/B sum_i log( e^{a_i.v_i / tau} / sum_j e^{a_i.v_j / tau} ) on unit vectors; j runs over the
    clips of all ranks (`negatives` = global) or of the clip's data lane (local).

    Both outputs are times `share.weight`, so that their mean over ranks is that of the batch.

    Args: direction: "both" is the mean of the two; "v2a" only looks from video to audio (CAV-MAE).
        share: of the global batch; None if every rank holds as many clips.
    Source: van den Oord et al. 2018; CAV-MAE (Gong et al. 2023) for v2a and local negatives.
    """
    share = share or equal_share(len(audio_BD))
    with torch.autocast(audio_BD.device.type, enabled=False):
        local = torch.stack([F.normalize(full_precision(x), dim=-1) for x in (audio_BD, video_BD)])
        queries = {"both": (0, 1), "v2a": (1,)}[direction]
        if negatives == "global":
            columns = gather_with_grad(local.transpose(0, 1), share).transpose(0, 1)
            first = share.first
            positives = torch.arange(first, first + local.shape[1], device=local.device)
            logits = [local[q] @ columns[1 - q].T / temperature for q in queries]
        else:
            n = share.lane_size or local.shape[1]
            lanes = local.unflatten(1, (-1, n))
            positives = torch.arange(n, device=local.device).repeat(lanes.shape[1])
            logits = [(lanes[q] @ lanes[1 - q].mT / temperature).flatten(0, 1) for q in queries]
        loss = torch.stack([F.cross_entropy(each, positives) for each in logits]).mean()
    hits = torch.stack([each.detach().argmax(1) == positives for each in logits])
    return Contrast(loss * share.weight, hits.float().mean() * share.weight)


def intra_modal(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    temperature: float,
    negatives: str = "global",
    share: RankShare | None = None,
) -> Tensor:
    """L_intra: mean over the streams of `first` of InfoNCE between two views of that stream.

    Args: first, second: embeddings [B, P] of the two views by stream, rows in the same order.
    """
    terms = [
        info_nce(first[s], second[s], temperature, "both", negatives, share).loss for s in first
    ]
    return torch.stack(terms).mean()


def labelled_rows(labels_B: Tensor) -> Tensor:
    """Labelled rows per rank, at least 1 / W: what sums over rows are divided by.

    Dividing by the mean over ranks makes the mean of losses exact when ranks hold different
    numbers of labelled rows. Collective: every rank calls it.
    """
    rows = mean_over_ranks((labels_B != NO_LABEL).sum().double())
    return rows.clamp_min(1.0 / world()[1])


def class_alignment(
    h: Mapping[str, Tensor],
    prototypes: Mapping[str, Tensor],
    labels_B: Tensor,
    temperature: float,
    teaches: Sequence[str],
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """L_cls: a clip's stream finds its class among the class prototypes of the other streams.

    Mean over ordered pairs s in `teaches`, t != s, of CE(h_s M^t' / tau_c, y).

    Args: h: [B, P] unit norm by stream. prototypes: [K, P] by stream. labels_B: int64 in [0, K),
        or -100. rows: `labelled_rows(labels_B)` where the caller has it already.
    """
    rows = labelled_rows(labels_B) if rows is None else rows
    labels_B = labels_B.long()
    terms = []
    for stream in teaches:
        others = [t for t in prototypes if t != stream]
        for other in others:
            logits_BK = class_logits(h[stream], prototypes[other], temperature)
            terms.append(F.cross_entropy(logits_BK, labels_B, reduction="sum"))
    return torch.stack(terms).mean() / rows.to(terms[0].dtype)


class ConfusionTerm(NamedTuple):
    """L_conf and the posteriors it saw."""

    loss: Tensor
    """Scalar."""
    posteriors_BK: Tensor
    """Mean over streams of softmax(h_s M^s' / tau_c), detached: what the confusion matrix eats."""


def confusion_loss(
    h: Mapping[str, Tensor],
    prototypes: Mapping[str, Tensor],
    labels_B: Tensor,
    temperature: float,
    weights_KK: Tensor,
    teaches: Sequence[str],
    *,
    rows: Tensor | None = None,
) -> ConfusionTerm:
    """L_conf: cross-entropy in which class l counts w_yl times against a clip of class y.

    Mean over s in `teaches` of -log( e^{q_y} / (e^{q_y} + sum_{l != y} w_yl e^{q_l}) ), with
    q = h_s M^s' / tau_c; all weights 1 is plain cross-entropy.

    Args: as `class_alignment`; weights_KK: >= 1 with ones on the diagonal (ConfusionState).
    Source: docs/method.md; pairwise margins log w_yl as in Menon et al. 2021 (arXiv 2007.07314).
    """
    rows = labelled_rows(labels_B) if rows is None else rows
    labels_B = labels_B.long()
    margins_BK = weights_KK[labels_B.clamp_min(0)].log()
    terms, posteriors = [], []
    for stream in teaches:
        logits_BK = class_logits(h[stream], prototypes[stream], temperature)
        terms.append(F.cross_entropy(logits_BK + margins_BK, labels_B, reduction="sum"))
        posteriors.append(logits_BK.detach().softmax(1))
    loss = torch.stack(terms).mean() / rows.to(terms[0].dtype)
    return ConfusionTerm(loss, torch.stack(posteriors).mean(0))


def class_logits(h_BP: Tensor, prototypes_KP: Tensor, temperature: float) -> Tensor:
    """h M' / tau_c in at least float32: [B, P], [K, P] -> [B, K]."""
    with torch.autocast(h_BP.device.type, enabled=False):
        h_BP = full_precision(h_BP)
        return h_BP @ prototypes_KP.to(h_BP.dtype).T / temperature


def supervised_loss(
    logits_BC: Tensor, targets_BC: Tensor, weights_CC: Tensor | None = None
) -> Tensor:
    """Cross-entropy of fine-tuning over true classes, with confusion weights where given.

    Mean over clips of -sum_k t_k log( e^{q_k} / sum_l w_kl e^{q_l} ), w_kk = 1: the same weighting
    as `confusion_loss`, linear in soft targets (mixup, smoothing). None: plain cross-entropy.

    Args: targets_BC: probabilities of each clip's classes, rows sum to 1.
    """
    with torch.autocast(logits_BC.device.type, enabled=False):
        logits_BC = full_precision(logits_BC)
        targets_BC = targets_BC.to(logits_BC.dtype)
        if weights_CC is None:
            return F.cross_entropy(logits_BC, targets_BC)
        top_B1 = logits_BC.detach().amax(1, keepdim=True)
        partition_BC = (logits_BC - top_B1).exp() @ weights_CC.to(logits_BC.dtype).T
        return -(targets_BC * (logits_BC - top_B1 - partition_BC.log())).sum(1).mean()


def multi_label_loss(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """Binary cross-entropy of every class for itself, mean over clips and classes.

    Args: targets_BC: in [0, 1], 1 for each class of a clip.
    """
    with torch.autocast(logits_BC.device.type, enabled=False):
        logits_BC = full_precision(logits_BC)
        return F.binary_cross_entropy_with_logits(logits_BC, targets_BC.to(logits_BC.dtype))


def soft_targets(labels_BL: Tensor, n_classes: int, smoothing: float = 0.0) -> Tensor:
    """Ones at a clip's labels, `smoothing` of them spread over all classes: [B, C] float32.

    Args: labels_BL: a clip's labels, none twice; -1 stands for none.
    """
    # Not `one_hot`: it reads the smallest and largest label, for which a device may be waited for.
    classes_C = torch.arange(n_classes, device=labels_BL.device)
    hot_BC = (labels_BL[:, :, None] == classes_C).any(1).float()
    return hot_BC * (1 - smoothing) + smoothing / n_classes
