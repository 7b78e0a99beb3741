"""Pretrainer: pretraining step by step, batches and labels in, an encoder out.

Knows nothing of Ray, MLflow or files: it is given a reader, a `Rounds`, and callbacks.
Invariants: those of StepLoop; the negatives of a clip are the same whatever the number of workers.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clustering.rounds.protocol import Rounds
from training.config import TrainingConfig
from training.data.augment import normalise_fbank, normalise_frames
from training.data.device import DeviceBatch, on_device
from training.data.order import BatchPlan, EpochReads, FrameDraw
from training.data.reader import Reader
from training.data.rows import RowIndex
from training.data.views import ChunkMaker
from training.loop.gradients import Gradients, StepLoss
from training.loop.hooks import Hooks, World
from training.loop.labelling import Labelling
from training.loop.sample_probe import SampleProbe
from training.loop.step_loop import Course, StepLoop
from training.losses.gather import RankShare
from training.losses.objective import Labels, Phase
from training.model.encoder import Encoder
from training.model.numerics import trunk_numerics

_WAY_ON = (
    "A lower optim.lr or optim.clip_norm usually helps, with a new --out: from the start, or from "
    "the weights of before that step with --init {weights} if they were good (metrics.jsonl)."
)


class Pretrainer(StepLoop):
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
        stage = config.pretrain
        plan = BatchPlan.of(len(index), stage.batch_size, config.data)
        course = Course(stage.epochs, plan, config.optim)
        super().__init__(config, course, index, reader=reader, world=world, hooks=hooks)
        self.encoder = encoder.to(world.device)
        if stage.compile:
            self.encoder.compile_blocks()
        self.chunks = ChunkMaker(config, self.encoder, self.plan, self.lanes, world.device)
        rows_W = self.plan.rows_of_workers(world.size)
        timed = functools.partial(self.meter.computed, "gather")
        self.share = RankShare(rows_W, world.rank, self.plan.lane_size, timed)
        self.gradients = Gradients(config, self.encoder, world, self.share, self.meter)
        self._optimise(self.encoder.named_parameters(), self._state_of_failure, _WAY_ON)
        self.labelling = Labelling(config, rounds, index, self.plan, world)
        self.sample = SampleProbe(index, world)

    def run(
        self, state: dict[str, Any] | None = None, until_epoch: int | None = None
    ) -> dict[str, float]:
        """Train to the end, from `state` if given. Returns: the metrics of the last log.

        Args: until_epoch: stop after this many epochs, before their round: the last checkpoint is
            then where runs with other labels can go on from.
        """
        last_epoch = self.course.epochs if until_epoch is None else until_epoch
        self.last_step = self.steps_per_epoch * last_epoch
        if state is not None:
            self.load_state_dict(state)
        if self.step % self.steps_per_epoch == 0 and self.meter.epoch_counts:
            self._end_epoch()  # That after which another run stopped.
        self._train(last_epoch)
        return self.meter.last

    def _batches(self, epochs: list[EpochReads]) -> Iterator[DeviceBatch]:
        """The steps of these epochs, read ahead up to the next evaluation pass and not beyond.

        What reads ahead keeps its place until it is asked for; the pass would wait for the place.
        """
        ahead: list[EpochReads] = []
        for reads in epochs:
            ahead.append(reads)
            if reads is epochs[-1] or self.labelling.passes_after(reads.epoch + 1):
                yield from on_device(self.reader.stream(ahead), self.world.device)
                ahead = []

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
        with self.meter.timed("stall"):
            self.labelling.apply_if_due(self.step)
        epoch = self.step // self.steps_per_epoch
        self.gradients.enter(self._phase(epoch))
        with self.meter.computed("augment"):
            chunks = self.chunks.of(batch, epoch, self.step)
            labels = self.labelling.of(batch.read.key)
        self._start_gradients()
        found = self.gradients.of(chunks, labels)
        loss = found.total.loss.detach() + self.config.loss.reconstruction * found.reconstruction
        with self.meter.computed("update"):
            made = tuple(z.detach() for z in found.embeddings.z.values())
            norm = self._take_step(self.encoder, batch.read, loss, made)
            self.labelling.observe(labels, found.total)
        self._count(found, labels, loss, norm)
        self.sample.add(batch.read.key, found.embeddings.z)
        if self.labelling.pushes(self.step):
            with self.meter.timed("push"):
                # As rows of the step that is done by them: a round asked for before it, and frozen
                # late, must not find them.
                self.labelling.push_features(batch.read.key, found.embeddings.h, self.step + 1)

    def _count(self, found: StepLoss, labels: list[Labels], loss: Tensor, norm: Tensor) -> None:
        self.meter.add({"loss": loss, "grad_norm": norm, **found.total.parts})
        if self.config.loss.reconstruction > 0:
            self.meter.add({"loss_reconstruction": found.reconstruction})
        if labels:
            labelled = (labels[0].labels_B >= 0).float().mean()
            self.meter.add({"labelled_frac": labelled * self.share.weight})

    def _update_confusion(self) -> None:
        self.labelling.update_confusion(self.step)

    def _measured(self, at_epoch_end: bool) -> dict[str, float]:
        of_epoch = self.sample.measure() if at_epoch_end else {}
        return self.labelling.metrics() | of_epoch

    def _end_epoch(self) -> None:
        """A round of clustering, where one is due."""
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

    def _own_state(self) -> dict[str, Any]:
        return {
            "encoder": dict(self.encoder.state_dict()),
            "labelling": self.labelling.state_dict(),
            "sample": self.sample.state_dict(),
        }

    def _load_own_state(self, state: dict[str, Any]) -> None:
        """A round that was pending is asked for again."""
        self.encoder.load_state_dict(state["encoder"])
        self.sample.load_state_dict(state["sample"])
        self.labelling.load_state_dict(state["labelling"])

    def _state_of_failure(self) -> dict[str, Any]:
        if self.labelling.push is not None:
            self.labelling.push.forget()
        return self.state_dict()
