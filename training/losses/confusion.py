"""How much each pair of pseudo-classes is confused now, and the weights L_conf makes of it.

Knows nothing of streams, prototypes or how labels were made. Invariants: after `update` every rank
holds the same bits; weights are finite and >= 1 with ones on the diagonal, also for classes without
a clip; gamma = 0 makes every weight exactly 1, and without a call of `weigh` or `update` they are;
how often `update` is called within an epoch does not change what an epoch of steady posteriors
leads to.

Shapes: B clips, K classes. C_kl: mean posterior of class l over clips labelled k; rows sum to 1.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.kmeans.label_table import NO_LABEL
from training.config import ConfusionConfig
from training.losses.gather import world

_UNIT = 2.0**36
"""Posteriors are summed as whole multiples of 1 / _UNIT: such a sum is exact, so it is the same in
any order, on any number of ranks, and resumed from a checkpoint; 2^27 clips of a class fit."""


def relative_degrees(confusion_KK: Tensor) -> Tensor:
    """d_kl: symmetrised confusion without its diagonal, each row scaled to mean 1.

    A row without confusion is all zeros. Source: docs/method.md.
    """
    n_classes = confusion_KK.shape[0]
    degrees_KK = (confusion_KK + confusion_KK.T) / 2
    degrees_KK.fill_diagonal_(0)
    mean_K1 = degrees_KK.sum(1, keepdim=True) / max(n_classes - 1, 1)
    return torch.where(mean_K1 > 0, degrees_KK / mean_K1.clamp_min(1e-300), 0.0)


def confusion_weights(confusion_KK: Tensor, gamma: float, w_max: float) -> Tensor:
    """How much harder class k must push away class l, from how often they are confused now.

    w_kl = clip(d_kl^gamma, 1, w_max) of `relative_degrees`.

    Returns: [K, K], w >= 1, w_kk = 1; a row with no confusion is all ones.
    Raises: ValueError if gamma < 0 or w_max < 1.
    Source: docs/method.md; pairwise margins of Menon et al. 2021 (arXiv 2007.07314).
    """
    if gamma < 0 or w_max < 1:
        raise ValueError(f"gamma = {gamma}, w_max = {w_max}: need gamma >= 0 and w_max >= 1")
    return relative_degrees(confusion_KK.double()).pow(gamma).clamp(1.0, w_max).fill_diagonal_(1.0)


def control_weights(weights_KK: Tensor, control: str, seed: int) -> Tensor:
    """Weights that are as large for each class, and forget which classes it is confused with.

    `shuffled`: each class's weights, dealt out to the others by chance; the deal hangs on K and
    seed alone, so all ranks, and a run that is resumed, make the same one. `constant`: their mean.
    """
    n_classes = len(weights_KK)
    others = ~torch.eye(n_classes, dtype=torch.bool, device=weights_KK.device)
    rows = weights_KK[others].view(n_classes, n_classes - 1)
    if control == "constant":
        dealt = rows.mean(1, keepdim=True).expand_as(rows)
    else:
        dealt = rows.gather(1, _deal(n_classes, seed, rows.device).long())
    controlled_KK = torch.ones_like(weights_KK)
    controlled_KK[others] = dealt.flatten()
    return controlled_KK


@functools.lru_cache(maxsize=1)
def _deal(n_classes: int, seed: int, device: torch.device) -> Tensor:
    """Which of its K - 1 weights a class gives to each other one: int32 [K, K - 1].

    Kept: it is the same at every update, and for 3,000 classes it took 6 s to draw.
    """
    # On the CPU, whose generator draws the same whatever the device.
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand((n_classes, n_classes - 1), generator=generator)
    return draws.argsort(dim=1).int().to(device)


def mean_offdiagonal(confusion_KK: Tensor) -> Tensor:
    """The mean confusion degree: share of posterior mass on wrong classes, in [0, 1]; scalar."""
    return (1.0 - confusion_KK.double().diagonal().mean()).float()


class ConfusionState:
    """The running confusion matrix of one clustering head, and its weights.

    Args: confusion_KK: the estimate published with the round, from the whole bank under the new
        prototypes; it stands until training has seen enough to move it. clips_K: clips that have
        each label, which the estimate rests on. seed: of the control `shuffled`.
    """

    def __init__(
        self, confusion_KK: Tensor, clips_K: Tensor, config: ConfusionConfig, seed: int = 0
    ) -> None:
        self.config, self.seed = config, seed
        self.prior_K1 = (
            config.pseudo_counts / clips_K.to(confusion_KK).double().clamp_min(1)[:, None]
        )
        self.confusion_KK = confusion_KK.detach().double().clone()
        n_classes = confusion_KK.shape[0]
        # sums of posteriors by label, the last column counts clips: one tensor, one all-reduce
        self.sums_KK1 = torch.zeros(
            n_classes, n_classes + 1, dtype=torch.int64, device=self.confusion_KK.device
        )
        self.unseen_epochs_K = self.confusion_KK.new_zeros(n_classes)
        self.weights_KK = torch.ones_like(self.confusion_KK, dtype=torch.float32)
        self.mean_offdiagonal = mean_offdiagonal(self.confusion_KK)

    @torch.no_grad()
    def accumulate(self, posteriors_BK: Tensor, labels_B: Tensor) -> None:
        """Add this rank's clips; rows labelled -100 are left out. No communication."""
        labelled_B = (labels_B != NO_LABEL).long()
        units_BK = (posteriors_BK.double() * _UNIT).round().long()
        rows = torch.cat([units_BK, torch.ones_like(labelled_B)[:, None]], dim=1)
        self.sums_KK1.index_add_(0, labels_B.long().clamp_min(0), rows * labelled_B[:, None])

    @torch.no_grad()
    def update(self, elapsed_epochs: float, since_labels_epochs: float) -> None:
        """Move the estimate by what all ranks have accumulated and `weigh` anew; collective.

        C_k <- m C_k + (1 - m) (mean posterior of its clips), m = ema_per_epoch ^ (epochs since
        class k was last seen); classes not seen stay as they are. `static` keeps the first matrix.

        Args: elapsed_epochs: since the last update. since_labels_epochs: as in `weigh`.
        """
        if world()[1] > 1:
            dist.all_reduce(self.sums_KK1)
        self.unseen_epochs_K += elapsed_epochs
        counts_K = self.sums_KK1[:, -1]
        if self.config.update == "dynamic":
            seen_K = counts_K > 0
            means_KK = self.sums_KK1[:, :-1].double() / _UNIT / counts_K.clamp_min(1)[:, None]
            kept_K = self.config.ema_per_epoch**self.unseen_epochs_K
            share_K1 = torch.where(seen_K, 1 - kept_K, 0.0)[:, None]
            self.confusion_KK += share_K1 * (means_KK - self.confusion_KK)
            self.unseen_epochs_K.masked_fill_(seen_K, 0)
        self.sums_KK1.zero_()
        self.mean_offdiagonal = mean_offdiagonal(self.confusion_KK)
        self.weigh(since_labels_epochs)

    @torch.no_grad()
    def weigh(self, since_labels_epochs: float) -> None:
        """Make the weights of the estimate as it is. No communication.

        Args: since_labels_epochs: since the first labels of the run, for the ramp of gamma.
        """
        ramp = since_labels_epochs / self.config.ramp_epochs if self.config.ramp_epochs else 1.0
        gamma = self.config.gamma * min(max(ramp, 0.0), 1.0)
        # Without evidence all pairs are as confused as another, and every weight is 1.
        smoothed_KK = self.confusion_KK + self.prior_K1
        weights_KK = confusion_weights(smoothed_KK, gamma, self.config.w_max)
        if self.config.weights != "degree":
            weights_KK = control_weights(weights_KK, self.config.weights, self.seed)
        self.weights_KK = weights_KK.float()

    def degree_of_seen(self, epochs: float) -> float:
        """The mean confusion degree of what was seen alone, of an estimate that began uniform.

        What is left of the beginning in a row is ema_per_epoch ^ (epochs until its class was last
        seen). Args: epochs: of updates so far. Returns: NaN before any class was seen.
        """
        seen_at_K = (epochs - self.unseen_epochs_K).cpu()
        left_K = self.config.ema_per_epoch**seen_at_K
        own_K = self.confusion_KK.diagonal().cpu() - left_K / len(left_K)
        # Of a class that was never seen nothing but rounding is left of either.
        seen_K = seen_at_K > 1e-9
        return float(1.0 - (own_K / (1.0 - left_K))[seen_K].mean())

    def state_dict(self) -> dict[str, Tensor]:
        """All that `load_state_dict` needs to go on exactly; tensors only. Collective.

        Its size does not depend on the number of ranks: what they have accumulated is one sum.
        """
        sums_KK1 = self.sums_KK1.clone()
        if world()[1] > 1:
            dist.all_reduce(sums_KK1)
        return {
            "confusion_KK": self.confusion_KK.clone(),
            "sums_KK1": sums_KK1,
            "unseen_epochs_K": self.unseen_epochs_K.clone(),
            "weights_KK": self.weights_KK.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`, moved to the device of this state; ranks may be others now."""
        device = self.confusion_KK.device
        for name in ("confusion_KK", "unseen_epochs_K", "weights_KK"):
            setattr(self, name, state[name].to(device).clone())
        sums_KK1 = state["sums_KK1"].to(device).clone()
        # The next update adds up all ranks: one of them holds what was there before.
        self.sums_KK1 = sums_KK1 if world()[0] == 0 else sums_KK1.zero_()
        self.mean_offdiagonal = mean_offdiagonal(self.confusion_KK)
