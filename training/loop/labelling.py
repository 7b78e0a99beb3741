"""Labelling: features to rounds of clustering, and rounds to the labels a training step uses.

Owns the `Rounds` of a run: knows nothing of encoders or of how batches are read. Invariant: labels
change only at the step announced when their round was asked for, on all ranks at once; a round that
is late makes training wait, and timing never changes the result; the labels of a round apply before
the next one is asked for.

Shapes: B clips of this rank, K clusters, P projection.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clustering.kmeans.label_table import LabelTable
from clustering.rounds.health import agreement
from clustering.rounds.protocol import HeadLabels, PublishedRound, RoundRequest, Rounds
from training.config import RoundsConfig, TrainingConfig
from training.data.device import to_device
from training.data.order import BatchPlan
from training.data.rows import RowIndex
from training.loop.hooks import World
from training.loop.push import FeaturePush
from training.losses.confusion import ConfusionState
from training.losses.gather import mean_over_ranks
from training.losses.objective import Labels, Total

log = logging.getLogger(__name__)


def lead_steps(config: RoundsConfig, steps_per_epoch: int) -> int:
    """Steps from the start of a round to its labels: `rounds.lead_steps`, or those until the next
    round starts, which would else be left out."""
    return min(config.lead_steps, config.every_epochs * steps_per_epoch)


class Labelling:
    """When rounds start, which labels are in force, and what is known of them."""

    def __init__(
        self,
        config: TrainingConfig,
        rounds: Rounds | None,
        index: RowIndex,
        plan: BatchPlan,
        world: World,
    ) -> None:
        """Args: rounds: None never labels. index: its labels are for evaluation only."""
        self.config, self.world, self.n_clips = config, world, len(index)
        self.rounds = None if config.rounds.labels == "none" else rounds
        self.push = None if self.rounds is None else FeaturePush(self.rounds, world)
        self.steps_per_epoch = plan.steps(len(index))
        self.total_steps = self.steps_per_epoch * config.pretrain.epochs
        self.lead_steps = lead_steps(config.rounds, self.steps_per_epoch)
        compared = plan.compared(config.loss.negatives)
        self.gate_nats = math.log(compared) - config.rounds.margin_nats
        order = np.argsort(index.keys_N)
        self.truth = LabelTable(index.keys_N[order], index.labels_N[order])
        self.heads: list[HeadLabels] = []
        self.in_force: list[Labels] = []
        """One for each of `heads`, without clips."""
        self.round = 0
        self.pending: RoundRequest | None = None
        self.first_step: int | None = None
        self.confusion_step = 0
        """Of the last update of the confusion matrices."""
        self.health: dict[str, float] = {}
        self.rows_dropped = 0.0
        self.waited_s = 0.0

    @property
    def labelled(self) -> bool:
        """Whether any label is in force."""
        return bool(self.in_force)

    def pushes(self, step: int) -> bool:
        """Whether the features of this step go to the bank."""
        schedule = self.config.rounds
        if self.rounds is None or schedule.features != "train":
            return False
        # One epoch ahead of the first round, so that it finds a row of every clip.
        return step // self.steps_per_epoch >= schedule.warmup_epochs - 1

    def push_features(self, keys_B: NDArray[np.uint64], h: Mapping[str, Tensor], step: int) -> None:
        """Hand the class heads' embeddings of some clips to the bank."""
        assert self.push is not None
        rows = torch.cat([h[s].detach() for s in self.config.loss.label_streams], dim=1)
        self.push.add(keys_B, rows, step)

    def start_if_due(
        self, step: int, loss_instance: float, evaluation_pass: Callable[[], None]
    ) -> None:
        """Ask for a round at the end of an epoch, if it is time for one. Collective.

        Args: loss_instance: mean InfoNCE of the epoch. evaluation_pass: pushes the features of
            every clip.
        """
        self.apply_if_due(step)  # A round that is pending would keep the next one from starting.
        if not self._wants_round(step, loss_instance):
            return
        assert self.rounds is not None
        assert self.push is not None
        if self.config.rounds.features == "pass":
            evaluation_pass()
        self.push.flush(self.config.rounds.timeout_s)
        dropped = torch.tensor(float(self.push.newly_dropped()), device=self.world.device)
        self.rows_dropped = float(mean_over_ranks(dropped)) * self.world.size
        self.world.barrier()
        self.pending = self._request(step)
        if self.world.rank == 0:
            self.rounds.start(self.pending)
        self.world.barrier()

    def passes_after(self, epochs_done: int) -> bool:
        """Whether an evaluation pass may come at the end of this epoch, for a round."""
        is_pass = self.config.rounds.features == "pass"
        return is_pass and self._may_start(epochs_done * self.steps_per_epoch)

    def _may_start(self, step: int) -> bool:
        """Whether the schedule has a round at the end of an epoch; each until there is a first one.

        None starts whose labels would teach the last step alone, or none.
        """
        schedule, epochs_done = self.config.rounds, step // self.steps_per_epoch
        if self.rounds is None or epochs_done < schedule.warmup_epochs:
            return False
        if step + self.lead_steps >= self.total_steps - 1:
            return False
        return not (self.round and (epochs_done - schedule.warmup_epochs) % schedule.every_epochs)

    def _wants_round(self, step: int, loss_instance: float) -> bool:
        """Whether a round starts at the end of an epoch with this mean InfoNCE.

        Until there were labels, it waits until InfoNCE has left its plateau, the log of the number
        of clips that are compared: labels made on the plateau collapse the encoder. A round that
        was withheld gave none.
        """
        if self.pending is not None or not self._may_start(step):
            return False
        waits = self.first_step is None and self.config.rounds.margin_nats >= 0
        if waits and loss_instance > self.gate_nats:
            log.warning(
                "no labels after epoch %d: InfoNCE %.3f is not below ln n - margin = %.3f yet",
                step // self.steps_per_epoch,
                loss_instance,
                self.gate_nats,
            )
            return False
        return True

    def _request(self, step: int) -> RoundRequest:
        """The next round: made of what was pushed up to `step`."""
        schedule = self.config.rounds
        number = self.round + 1
        cold = schedule.cold_every > 0 and number > 1 and (number - 1) % schedule.cold_every == 0
        return RoundRequest(
            round=number,
            step=step,
            effective_step=step + self.lead_steps,
            posterior_temperature=self.config.loss.class_temperature,
            cold=cold,
            expected_rows=self.n_clips,
        )

    def apply_if_due(self, step: int) -> None:
        """Switch to the pending round's labels at its step; waits for them."""
        if self.pending is None or step < self.pending.effective_step:
            return
        assert self.rounds is not None
        started = time.monotonic()
        published = self.rounds.wait(self.pending.round, self.config.rounds.timeout_s)
        self.round, self.pending = published.round, None
        self._take(published, step)
        self.waited_s += time.monotonic() - started
        log.info("step %d: labels of round %d apply", step, self.round)

    def _take(self, published: PublishedRound, step: int) -> None:
        own = {"rows_dropped": self.rows_dropped, "withheld": float(not published.ok)}
        self.health = {**published.health, **own}
        self.heads, self.in_force = [], []
        if not published.ok:
            log.warning(
                "round %d is withheld: %s. No clip has a label until the next round applies: those "
                "of before may be what the encoder collapsed by",
                published.round,
                published.reason,
            )
            return
        self.first_step = step if self.first_step is None else self.first_step
        self.confusion_step = step
        for head in published.heads:
            # Else they were all 1, whatever is confused, until the next update.
            self._enforce(head).confusion.weigh(self._since_labels(step))
        first = published.heads[0]
        true_N = self.truth.lookup(first.keys_N)
        if (true_N >= 0).any():
            self.health |= agreement(first.labels_N, true_N)

    def _enforce(self, head: HeadLabels) -> Labels:
        prototypes = {s: self._on_device(m) for s, m in head.prototypes.items()}
        confusion_KK = self._on_device(head.confusion_KK)
        labels_N = torch.from_numpy(head.labels_N[head.labels_N >= 0].astype(np.int64))
        clips_K = torch.bincount(labels_N, minlength=len(confusion_KK))
        state = ConfusionState(confusion_KK, clips_K, self.config.confusion, self.config.seed)
        nobody = torch.empty(0, dtype=torch.int64, device=self.world.device)
        labels = Labels(nobody, prototypes, head.teaches, state)
        self.heads.append(head)
        self.in_force.append(labels)
        return labels

    def _on_device(self, x: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(x, np.float32)).to(self.world.device)

    def of(self, keys_B: NDArray[np.uint64]) -> list[Labels]:
        """The labels of some clips under every clustering in force."""
        return [
            labels._replace(
                labels_B=to_device(head.lookup(keys_B).astype(np.int64), self.world.device)
            )
            for head, labels in zip(self.heads, self.in_force, strict=True)
        ]

    def observe(self, labels: list[Labels], total: Total) -> None:
        """Add a step's posteriors to the confusion matrices; no communication."""
        for head, posteriors_BK in zip(labels, total.posteriors, strict=True):
            head.confusion.accumulate(posteriors_BK, head.labels_B)

    def update_confusion(self, step: int) -> None:
        """Renew the confusion matrices from the steps since their last update. Collective."""
        if self.first_step is None:
            return
        elapsed = (step - self.confusion_step) / self.steps_per_epoch
        self.confusion_step = step
        for labels in self.in_force:
            labels.confusion.update(elapsed, self._since_labels(step))

    def _since_labels(self, step: int) -> float:
        """Epochs since the first labels of the run."""
        assert self.first_step is not None
        return (step - self.first_step) / self.steps_per_epoch

    def metrics(self) -> dict[str, float]:
        """Health of the newest round, by MLflow metric name; a withheld one has no labels."""
        out = {f"clustering/{name}": value for name, value in self.health.items()}
        if self.in_force:
            degrees = [float(labels.confusion.mean_offdiagonal) for labels in self.in_force]
            out["confusion/mean_offdiagonal"] = float(np.mean(degrees))
        return out

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; numbers, strings and tensors only. Collective.

        Labels and prototypes are those of round `round`, which is on storage: a copy of them in
        every checkpoint would be 12 bytes a clip. Rows on their way to the bank are in it
        afterwards.
        """
        if self.push is not None:
            self.push.settle()
        pending = None if self.pending is None else vars(self.pending)
        return {
            "round": self.round,
            "pending": pending,
            "first_step": self.first_step,
            "confusion_step": self.confusion_step,
            "health": self.health,
            "rows_dropped": self.rows_dropped,
            "confusion": [
                {name: value.cpu() for name, value in labels.confusion.state_dict().items()}
                for labels in self.in_force
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`; a round that was pending is asked for again. Collective.

        Raises: ClusteringError if the round whose labels were in force is no longer on storage.
        """
        self.round, self.first_step = state["round"], state["first_step"]
        self.confusion_step = state["confusion_step"]
        self.health, self.rows_dropped = dict(state["health"]), state["rows_dropped"]
        self.pending = None if state["pending"] is None else RoundRequest(**state["pending"])
        self.heads, self.in_force = [], []
        if state["confusion"]:
            assert self.rounds is not None
            published = self.rounds.wait(self.round, self.config.rounds.timeout_s)
            for head, confusion in zip(published.heads, state["confusion"], strict=True):
                self._enforce(head).confusion.load_state_dict(confusion)
        if self.pending is not None and self.rounds is not None:
            if self.world.rank == 0:
                self.rounds.start(self.pending)
            self.world.barrier()
