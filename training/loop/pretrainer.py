"""Pretrainer: pretraining step by step, batches and labels in, an encoder out.

Knows nothing of Ray, MLflow or files: it is given a reader, a `Rounds`, and callbacks.
Invariants: a step depends on the config, the weights and the planned clips alone, so a run resumed
from any checkpoint equals the uninterrupted one; the global batch, its negatives and the schedule
are the same whatever the number of workers.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from clustering.rounds.protocol import Rounds
from training.config import TrainingConfig
from training.data.augment import normalise_fbank, normalise_frames
from training.data.device import DeviceBatch, on_device
from training.data.order import BatchPlan, EpochReads, FrameDraw, lanes_of
from training.data.reader import Reader
from training.data.rows import RowIndex
from training.data.views import ChunkMaker
from training.loop.finite import FiniteSteps, StepTaken
from training.loop.gradients import Gradients, StepLoss
from training.loop.hooks import Hooks, World
from training.loop.labelling import Labelling
from training.loop.meter import Meter
from training.loop.sample_probe import SampleProbe
from training.loop.schedule import (
    learning_rate,
    make_optimizer,
    restore_optimizer,
    set_learning_rate,
)
from training.losses.gather import RankShare
from training.losses.objective import Labels, Phase
from training.model.encoder import Encoder
from training.model.numerics import trunk_numerics


class Pretrainer:
    """DICCAE pretraining on the rows of `index` (docs/design.md, "Pretraining")."""

    def __init__(
        self,
        config: TrainingConfig,
        encoder: Encoder,
        index: RowIndex,
        *,
        reader: Reader,
        rounds: Rounds | None,
        world: World,
        hooks: Hooks,
    ) -> None:
        self.config, self.reader, self.world, self.hooks = config, reader, world, hooks
        self.plan = BatchPlan.of(len(index), config.pretrain.batch_size, config.data)
        self.steps_per_epoch = self.plan.steps(len(index))
        self.last_step = self.steps_per_epoch * config.pretrain.epochs
        self.step = 0
        self.meter = Meter(world.device)
        self.meter.keep("world_size", world.size)
        self.encoder = encoder.to(world.device)
        if config.pretrain.compile:
            self.encoder.compile_blocks()
        lanes = lanes_of(world.rank, world.size, self.plan.lanes)
        self.chunks = ChunkMaker(config, self.encoder, self.plan, lanes, world.device)
        rows_W = self.plan.rows_of_workers(world.size)
        timed = functools.partial(self.meter.computed, "gather")
        self.share = RankShare(rows_W, world.rank, self.plan.lane_size, timed)
        self.gradients = Gradients(config, self.encoder, world, self.share, self.meter)
        self.optimizer = make_optimizer(
            self.encoder.named_parameters(), config.optim, world.runs_ahead
        )
        self.steps = FiniteSteps(
            self.optimizer,
            index.clip_ids_N,
            world,
            keep=lambda content: self.hooks.failed(content),
            state=self._state_of_failure,
        )
        self.labelling = Labelling(config, rounds, index, self.plan, world)
        self.sample = SampleProbe(index, world)

    def run(
        self, state: dict[str, Any] | None = None, until_epoch: int | None = None
    ) -> dict[str, float]:
        """Train to the end, from `state` if given. Returns: the metrics of the last log.

        Args: until_epoch: stop after this many epochs, before their round: the last checkpoint is
            then where runs with other labels can go on from.
        """
        last_epoch = self.config.pretrain.epochs if until_epoch is None else until_epoch
        self.last_step = self.steps_per_epoch * last_epoch
        if state is not None:
            self.load_state_dict(state)
        if self.step % self.steps_per_epoch == 0 and self.meter.epoch_counts:
            self._maybe_start_round()  # That of the epoch after which another run stopped.
        first_epoch, first_step = divmod(self.step, self.steps_per_epoch)
        epochs = [
            EpochReads(epoch, first_step if epoch == first_epoch else 0, self._frames(epoch))
            for epoch in range(first_epoch, last_epoch)
        ]
        batches = on_device(self.reader.stream(epochs), self.world.device)
        while self.step < self.last_step:
            with self.meter.timed("stall"):
                self.labelling.apply_if_due(self.step)
            with self.meter.timed("data_wait"):
                batch = next(batches)
            self._train_step(batch)
            self.step += 1
            self._after_step()
        return self.meter.last

    def _frames(self, epoch: int) -> FrameDraw:
        return FrameDraw(self.config.data.frames_per_clip, 2 if self._intra(epoch) else 1)

    def _intra(self, epoch: int) -> bool:
        loss = self.config.loss
        return loss.intra > 0 and (loss.intra_epochs is None or epoch < loss.intra_epochs)

    def _phase(self, epoch: int) -> Phase:
        labelled = self.labelling.labelled
        fusion = self.config.loss.fusion and (labelled or self.labelling.pushes(self.step))
        return Phase(self._intra(epoch), labelled, fusion)

    def _train_step(self, batch: DeviceBatch) -> None:
        epoch = self.step // self.steps_per_epoch
        self.gradients.enter(self._phase(epoch))
        with self.meter.computed("augment"):
            chunks = self.chunks.of(batch, epoch, self.step)
            labels = self.labelling.of(batch.read.key)
        lr = learning_rate(
            self.config.optim, self.step, self.steps_per_epoch, self.config.pretrain.epochs
        )
        set_learning_rate(self.optimizer, lr)
        self.meter.keep("lr", lr)
        self.optimizer.zero_grad(set_to_none=True)
        found = self.gradients.of(chunks, labels)
        loss = found.total.loss.detach() + self.config.loss.reconstruction * found.reconstruction
        with self.meter.computed("update"):
            norm = self._clip()
            self.steps.take(StepTaken(self.step, batch.read, loss, norm))
            self.labelling.observe(labels, found.total)
        self._count(found, labels, loss, norm)
        self.sample.add(batch.read.key, found.embeddings.z)
        if self.labelling.pushes(self.step):
            with self.meter.timed("push"):
                # As rows of the step that is done by them: a round asked for before it, and frozen
                # late, must not find them.
                self.labelling.push_features(batch.read.key, found.embeddings.h, self.step + 1)

    def _clip(self) -> Tensor:
        limit = self.config.optim.clip_norm
        parameters = [p for p in self.encoder.parameters() if p.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, limit if limit is not None else float("inf"))

    def _count(self, found: StepLoss, labels: list[Labels], loss: Tensor, norm: Tensor) -> None:
        self.meter.add({"loss": loss, "grad_norm": norm, **found.total.parts})
        if self.config.loss.reconstruction > 0:
            self.meter.add({"loss_reconstruction": found.reconstruction})
        if labels:
            labelled = (labels[0].labels_B >= 0).float().mean()
            self.meter.add({"labelled_frac": labelled * self.share.weight})

    def _after_step(self) -> None:
        at_epoch_end = self.step % self.steps_per_epoch == 0
        schedule = self.config.pretrain
        if at_epoch_end or self.step % self.config.confusion.update_steps == 0:
            self.labelling.update_confusion(self.step)
        leaving = False
        if at_epoch_end:
            self._log(self.sample.measure())
            self._maybe_start_round()
        elif self.step % schedule.log_every == 0:
            self._log({})
            leaving = self.hooks.leaving()
        if at_epoch_end or leaving or self.step % schedule.checkpoint_every == 0:
            with self.meter.timed("checkpoint"):
                self.steps.settle()
                self.hooks.save(self.state_dict())

    def _log(self, of_epoch: dict[str, float]) -> None:
        metrics = self.meter.flush(self.step, self.config.pretrain.batch_size)
        metrics["epoch"] = self.step / self.steps_per_epoch
        metrics |= self.labelling.metrics() | of_epoch
        if self.world.rank == 0:
            self.hooks.log(self.step, metrics)

    def _maybe_start_round(self) -> None:
        if self.step == self.last_step:
            return
        self.steps.settle()  # Before rows of its last step are in a round.
        loss_instance = self.meter.epoch_mean("loss_instance")
        with self.meter.timed("stall"):
            self.labelling.start_if_due(self.step, loss_instance, self._evaluation_pass)

    @torch.no_grad()
    def _evaluation_pass(self) -> None:
        """Push the features of every clip, from middle frames and without augmentation."""
        self.encoder.eval()
        frames = FrameDraw(self.config.data.frames_per_clip, random=False)
        for batch in on_device(self.reader.sweep(frames), self.world.device):
            with trunk_numerics(self.config.pretrain, self.world.device):
                h = self.encoder(
                    normalise_fbank(batch.fbank_nTM, self.config.data),
                    normalise_frames(batch.frames_nFHWC),
                    self.config.loss.label_streams,
                ).h
            self.labelling.push_features(batch.read.key, h, self.step)
        self.encoder.train()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; loads with weights_only=True. Collective."""
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "encoder": {k: v.detach().cpu() for k, v in self.encoder.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "labelling": self.labelling.state_dict(),
            "meter": self.meter.state_dict(),
            "sample": self.sample.state_dict(),
        }

    def _state_of_failure(self) -> dict[str, Any]:
        if self.labelling.push is not None:
            self.labelling.push.forget()
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint; a round that was pending is asked for again. Collective."""
        self.encoder.load_state_dict(state["encoder"])
        restore_optimizer(self.optimizer, state["optimizer"], self.world.runs_ahead)
        self.meter.load_state_dict(state["meter"])
        self.sample.load_state_dict(state["sample"])
        self.step = state["step"]
        self.labelling.load_state_dict(state["labelling"])
