"""From rounds of clustering to the labels a training step uses.

Pure: talks to a `Rounds` (one process or Ray actors), knows nothing of encoders or of how batches
are read. Invariant: labels change only at the step announced when their round was asked for, on all
ranks at once; a round that is late makes training wait, and timing never changes the result.

Shapes: B clips of this rank, K clusters, P projection.
"""

import logging
import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clustering.rounds.health import agreement
from clustering.rounds.protocol import HeadLabels, PublishedRound, RoundRequest, Rounds
from training.config import TrainingConfig
from training.losses.confusion import ConfusionState
from training.losses.objective import Labels

log = logging.getLogger(__name__)


class ActiveHead(NamedTuple):
    """One clustering in force."""

    head: HeadLabels
    prototypes: dict[str, Tensor]
    confusion: ConfusionState


class Labelling:
    """When rounds start, which labels are in force, and what is known of them.

    Args: truth: keys (sorted) and labels of the clips, -1 where unknown; for evaluation only.
    """

    def __init__(
        self,
        config: TrainingConfig,
        rounds: Rounds | None,
        batch_size: int,
        n_clips: int,
        truth: tuple[np.ndarray, np.ndarray],
        device: torch.device,
    ) -> None:
        self.config, self.rounds, self.truth, self.device = config, rounds, truth, device
        self.gate_nats = math.log(batch_size) - config.rounds.margin_nats
        self.n_clips = n_clips
        self.heads: list[ActiveHead] = []
        self.round = 0
        self.pending: RoundRequest | None = None
        self.first_step: int | None = None
        self.health: dict[str, float] = {}

    @property
    def labelled(self) -> bool:
        """Whether any label is in force."""
        return bool(self.heads)

    def wants_round(self, epochs_done: int, loss_instance: float) -> bool:
        """Whether a round starts after `epochs_done` epochs, the last with this mean InfoNCE.

        The first round waits until InfoNCE has left its plateau ln B: labels made on the plateau
        collapse the encoder.
        """
        schedule, total = self.config.rounds, self.config.pretrain.epochs
        if self.rounds is None or schedule.labels == "none" or self.pending is not None:
            return False
        if epochs_done < schedule.warmup_epochs or epochs_done >= total:
            return False
        if (epochs_done - schedule.warmup_epochs) % schedule.every_epochs and self.round:
            return False
        if self.round == 0 and loss_instance > self.gate_nats:
            log.warning(
                "no labels after epoch %d: InfoNCE %.3f is not below ln B - margin = %.3f yet",
                epochs_done,
                loss_instance,
                self.gate_nats,
            )
            return False
        return True

    def request(self, step: int, last_step: int) -> RoundRequest:
        """Announce the next round: made of what was pushed up to `step`."""
        schedule = self.config.rounds
        number = self.round + 1
        cold = schedule.cold_every > 0 and number > 1 and (number - 1) % schedule.cold_every == 0
        self.pending = RoundRequest(
            round=number,
            step=step,
            effective_step=min(step + schedule.lead_steps, last_step),
            cold=cold,
            posterior_temperature=self.config.loss.class_temperature,
            expected_rows=self.n_clips,
        )
        return self.pending

    def apply_if_due(self, step: int) -> float | None:
        """Switch to the pending round's labels at its step. Returns: seconds waited, or None."""
        if self.pending is None or step < self.pending.effective_step:
            return None
        assert self.rounds is not None
        started = time.monotonic()
        published = self.rounds.wait(self.pending.round, self.config.rounds.timeout_s)
        self.round, self.pending = published.round, None
        self._take(published, step)
        return time.monotonic() - started

    def _take(self, published: PublishedRound, step: int) -> None:
        self.health = dict(published.health)
        if not published.ok:
            log.warning("round %d is withheld: %s", published.round, published.reason)
            self.heads = []
            return
        self.heads = [self._activate(head) for head in published.heads]
        self.first_step = step if self.first_step is None else self.first_step
        keys, labels = self.truth
        if len(keys):
            head = published.heads[0]
            common = np.isin(head.keys_N, keys)
            true = labels[np.searchsorted(keys, head.keys_N[common])]
            known = true >= 0
            self.health |= agreement(head.labels_N[common][known], true[known])

    def _activate(self, head: HeadLabels) -> ActiveHead:
        prototypes = {
            stream: torch.from_numpy(np.array(m, np.float32)).to(self.device)
            for stream, m in head.prototypes.items()
        }
        confusion_KK = torch.from_numpy(np.array(head.confusion_KK, np.float32)).to(self.device)
        return ActiveHead(head, prototypes, ConfusionState(confusion_KK, self.config.confusion))

    def of(self, keys_B: np.ndarray) -> list[Labels]:
        """The labels of some clips under every clustering in force."""
        return [
            Labels(
                torch.from_numpy(active.head.lookup(keys_B).astype(np.int64)).to(self.device),
                active.prototypes,
                active.head.teaches,
                active.confusion,
            )
            for active in self.heads
        ]

    def metrics(self) -> dict[str, float]:
        """Health of the round in force, by MLflow metric name."""
        out = {f"clustering/{name}": value for name, value in self.health.items()}
        if self.heads:
            degrees = [active.confusion.mean_offdiagonal for active in self.heads]
            out["confusion/mean_offdiagonal"] = float(np.mean(degrees))
        return out

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; numbers, strings and tensors only."""
        pending = None if self.pending is None else vars(self.pending)
        return {
            "round": self.round,
            "pending": pending,
            "first_step": self.first_step,
            "health": self.health,
            "heads": [
                {
                    "name": active.head.name,
                    "teaches": list(active.head.teaches),
                    "keys": torch.from_numpy(active.head.keys_N.view(np.int64).copy()),
                    "labels": torch.from_numpy(active.head.labels_N.copy()),
                    "prototypes": {s: m.cpu() for s, m in active.prototypes.items()},
                    "confusion": {
                        name: value.cpu() for name, value in active.confusion.state_dict().items()
                    },
                }
                for active in self.heads
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`; a pending round is asked for again by the caller."""
        self.round, self.first_step = state["round"], state["first_step"]
        self.health = dict(state["health"])
        self.pending = None if state["pending"] is None else RoundRequest(**state["pending"])
        self.heads = []
        for saved in state["heads"]:
            head = HeadLabels(
                saved["name"],
                tuple(saved["teaches"]),
                saved["keys"].numpy().view(np.uint64),
                saved["labels"].numpy(),
                {stream: m.numpy() for stream, m in saved["prototypes"].items()},
                saved["confusion"]["confusion_KK"].float().numpy(),
            )
            active = self._activate(head)
            active.confusion.load_state_dict(saved["confusion"])
            self.heads.append(active)
