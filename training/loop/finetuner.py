"""Supervised fine-tuning, step by step, with the confusion-aware cross-entropy.

Knows nothing of Ray, MLflow or files. Invariants: with `auxiliary`, `confusion`, smoothing and
mixup off it is plain cross-entropy on the fused stream; a step depends on the config, the weights
and the planned clips alone, whatever the number of workers.

Shapes: B clips of this rank, C classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.config import TrainingConfig
from training.data.augment import augment_fbank, augment_frames, normalise_frames
from training.data.batches import Batch, BatchPlan, RowIndex, Views, lanes_of
from training.data.reader import EpochReads, Reader
from training.data.views import step_generator
from training.errors import TrainingError
from training.loop.meter import Meter
from training.loop.pretrainer import Hooks, World, stop_if_not_finite
from training.loop.schedule import learning_rate, make_optimizer, set_learning_rate
from training.losses.confusion import ConfusionState
from training.losses.gather import RankShare
from training.losses.terms import soft_targets, supervised_loss
from training.model.classifier import Classifier
from training.model.numerics import trunk_numerics

_MIXUP_BETA = 10.0
"""Beta(10, 10) of CAV-MAE's mixup."""


def balanced_draws(index: RowIndex, seed: int) -> Any:
    """Positions of an epoch drawn with replacement, inversely to the size of a clip's class.

    Source: CAV-MAE's sampler, weight 1000 / (n_c + 0.01).
    """
    counts_C = np.bincount(index.labels_N, minlength=len(index.classes))
    weights_N = 1000.0 / (counts_C[index.labels_N] + 0.01)
    p_N = weights_N / weights_N.sum()

    def draws(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch, 0xBA1])
        return rng.choice(len(index), size=len(index), p=p_N)

    return draws


class Finetuner:
    """Fine-tunes a classifier on the labelled rows of `index` (DESIGN section 7)."""

    def __init__(
        self,
        config: TrainingConfig,
        classifier: Classifier,
        index: RowIndex,
        reader: Reader,
        world: World,
        hooks: Hooks,
    ) -> None:
        if (index.labels_N < 0).any():
            bad = index.clip_ids_N[index.labels_N < 0][:3].tolist()
            raise TrainingError(
                f"clips without a known label, such as {', '.join(bad)}; fine-tuning needs one for "
                "every clip of the train split"
            )
        self.config, self.index, self.reader = config, index, reader
        self.world, self.hooks, self.tuning = world, hooks, config.finetune
        self.plan = BatchPlan.of(len(index), self.tuning.batch_size, config.data)
        self.lanes = lanes_of(world.rank, world.size, self.plan.lanes)
        self.share = RankShare(self.plan.rows_of_workers(world.size), world.rank)
        self.steps_per_epoch = self.plan.steps(len(index))
        self.total_steps = self.steps_per_epoch * self.tuning.epochs
        self.classifier = classifier.to(world.device).train()
        if config.pretrain.compile:
            self.classifier.encoder.compile_blocks()
        self.model: nn.Module = classifier
        if world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(classifier, device_ids=ids)
        self.optimizer = make_optimizer(
            ((n, p) for n, p in classifier.named_parameters() if p.requires_grad),
            self.tuning.optim,
        )
        n_classes = len(index.classes)
        uniform_CC = torch.full((n_classes, n_classes), 1.0 / n_classes, device=world.device)
        confusion = config.confusion.model_copy(update={"gamma": self.tuning.confusion})
        self.confusion = ConfusionState(uniform_CC, confusion)
        self.averages: dict[str, Tensor] = {}
        self.n_averaged = 0
        self.step = 0
        self.meter = Meter(world.device)
        self.meter.keep("world_size", world.size)

    def run(self, state: dict[str, Any] | None = None) -> dict[str, float]:
        """Train to the end, from `state` if given. Returns: the metrics of the last log."""
        if state is not None:
            self.load_state_dict(state)
        first_epoch, first_step = divmod(self.step, self.steps_per_epoch)
        views = Views(self.config.data.frames_per_clip)
        epochs = [
            EpochReads(epoch, first_step if epoch == first_epoch else 0, views)
            for epoch in range(first_epoch, self.tuning.epochs)
        ]
        batches = self.reader.stream(epochs)
        while self.step < self.total_steps:
            with self.meter.timed("data_wait"):
                batch = next(batches)
            self._train_step(batch)
            self.step += 1
            self._after_step()
        if self.averages:
            self.classifier.load_state_dict(self.averages)
        return self.meter.last

    def _train_step(self, batch: Batch) -> None:
        epoch = self.step // self.steps_per_epoch
        with self.meter.computed("augment"):
            fbank, frames, targets_BC = self._inputs(batch, epoch)
        lr = learning_rate(self.tuning.optim, self.step, self.steps_per_epoch, self.tuning.epochs)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        with self.meter.computed("forward"):
            with trunk_numerics(self.config.pretrain, self.world.device):
                logits = self.model(fbank, frames)
            weights_CC = None
            if self.tuning.confusion > 0 and epoch >= self.tuning.confusion_after_epochs:
                weights_CC = self.confusion.weights_KK
            main = "fusion" if self.tuning.mode == "multimodal" else self.tuning.mode
            losses = {s: supervised_loss(x, targets_BC, weights_CC) for s, x in logits.items()}
            side = [loss for s, loss in losses.items() if s != main]
            loss = losses[main] + self.tuning.auxiliary * sum(side, losses[main].new_zeros(()))
            loss = loss * self.share.weight
        with self.meter.computed("backward"):
            loss.backward()
        limit = self.tuning.optim.clip_norm
        with self.meter.computed("update"):
            norm = nn.utils.clip_grad_norm_(
                self.classifier.parameters(), limit if limit is not None else float("inf")
            )
            stop_if_not_finite(self, batch, loss.detach(), norm)
            self.optimizer.step()
        labels_B = torch.from_numpy(batch["label"]).to(self.world.device)
        posteriors_BC = logits[main].detach().float().softmax(1)
        self.confusion.accumulate(posteriors_BC, labels_B)
        hits = (posteriors_BC.argmax(1) == labels_B).float().mean() * self.share.weight
        self.meter.add({"loss": loss.detach(), "grad_norm": norm, "accuracy": hits})
        self.meter.keep("lr", lr)

    def _inputs(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented (and mixed) clips and their soft targets, lane by lane."""
        b = self.plan.batch_size // self.plan.lanes
        n_classes = len(self.index.classes)
        parts = []
        for i, lane in enumerate(self.lanes):
            rows = slice(i * b, (i + 1) * b)
            generator = step_generator(self.config.seed, epoch, self.step, lane, 1)
            fbank = torch.from_numpy(np.array(batch["fbank"][rows])).to(self.world.device).float()
            frames = normalise_frames(
                torch.from_numpy(np.array(batch["frames"][rows])).to(self.world.device)
            )
            labels = torch.from_numpy(np.array(batch["label"][rows])).to(self.world.device)
            targets = soft_targets(labels, n_classes, self.tuning.label_smoothing)
            if self.tuning.mixup > 0:
                fbank, frames, targets = _mix(fbank, frames, targets, self.tuning.mixup, generator)
            augment = self.tuning.augment
            parts.append(
                (
                    augment_fbank(fbank, augment, self.config.data, generator),
                    augment_frames(frames, augment, generator),
                    targets,
                )
            )
        fbank, frames, targets = (torch.cat(column) for column in zip(*parts, strict=True))
        return fbank, frames, targets

    def _after_step(self) -> None:
        at_epoch_end = self.step % self.steps_per_epoch == 0
        update_steps = self.config.confusion.update_steps
        if at_epoch_end or self.step % update_steps == 0:
            interval = self.step % self.steps_per_epoch % update_steps or update_steps
            since = self.step / self.steps_per_epoch - self.tuning.confusion_after_epochs
            self.confusion.update(interval / self.steps_per_epoch, since)
        leaving = False
        if at_epoch_end or self.step % self.config.pretrain.log_every == 0:
            self._log()
            leaving = self.hooks.leaving()
        if at_epoch_end:
            self._average()
        if at_epoch_end or leaving:
            self.hooks.save(self.state_dict())

    def _log(self) -> None:
        metrics = self.meter.flush(self.step, self.tuning.batch_size)
        metrics["epoch"] = self.step / self.steps_per_epoch
        metrics["confusion/mean_offdiagonal"] = self.confusion.mean_offdiagonal
        if self.world.rank == 0:
            self.hooks.log(self.step, metrics)

    def _average(self) -> None:
        """Running mean of the weights from `average_from_epoch` on."""
        first = self.tuning.average_from_epoch
        if first is None or self.step // self.steps_per_epoch < first:
            return
        self.n_averaged += 1
        for name, value in self.classifier.state_dict().items():
            mean = self.averages.setdefault(name, torch.zeros_like(value))
            mean += (value - mean) / self.n_averaged

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; loads with weights_only=True."""
        return {
            "step": self.step,
            "classifier": {k: v.cpu() for k, v in self.classifier.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "confusion": self.confusion.state_dict(),
            "averages": {k: v.cpu() for k, v in self.averages.items()},
            "n_averaged": self.n_averaged,
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint."""
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.confusion.load_state_dict(state["confusion"])
        self.averages = {k: v.to(self.world.device) for k, v in state["averages"].items()}
        self.n_averaged = state["n_averaged"]
        self.meter.load_state_dict(state["meter"])
        self.step = state["step"]


def _mix(
    fbank: Tensor, frames: Tensor, targets: Tensor, chance: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix clips with others of their lane: power spectra, pixels and targets by one lambda.

    CAV-MAE mixes waveforms; the store holds fbanks, whose powers add as those of unrelated sounds.
    """
    n = len(targets)
    partner = torch.randperm(n, generator=generator).to(targets.device)
    seed = int(torch.randint(0, 2**31 - 1, (1,), generator=generator))
    lam = torch.from_numpy(np.random.default_rng(seed).beta(_MIXUP_BETA, _MIXUP_BETA, n)).float()
    lam = torch.where(torch.rand(n, generator=generator) < chance, lam, 1.0).to(targets.device)
    l3, l5, l2 = lam.view(-1, 1, 1), lam.view(-1, 1, 1, 1, 1), lam.view(-1, 1)
    mixed = torch.logaddexp(fbank + l3.log(), fbank[partner] + (1 - l3).clamp_min(1e-12).log())
    fbank = torch.where(l3 < 1, mixed, fbank)
    frames = l5 * frames + (1 - l5) * frames[partner]
    return fbank, frames, l2 * targets + (1 - l2) * targets[partner]
