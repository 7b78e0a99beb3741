"""StepLoop: what pretraining and fine-tuning share: the steps of planned epochs, from any step on.

Knows nothing of losses, Ray, MLflow or files: it is given a reader and callbacks. Invariants: a
step depends on the config, the weights and the planned clips alone, so a run resumed from any
checkpoint equals the uninterrupted one; the global batch and the schedule are the same whatever
the number of workers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from training.config import OptimConfig, TrainingConfig
from training.data.device import DeviceBatch, on_device
from training.data.order import BatchPlan, EpochReads, FrameDraw, lanes_of
from training.data.reader import Batch, Reader
from training.data.rows import RowIndex
from training.loop.finite import FiniteSteps, StepTaken
from training.loop.hooks import Hooks, World
from training.loop.meter import Meter
from training.loop.schedule import (
    learning_rate,
    make_optimizer,
    restore_optimizer,
    set_learning_rate,
)


class Course(NamedTuple):
    """How long, in which batches and how fast a stage trains."""

    epochs: int
    plan: BatchPlan
    optim: OptimConfig


class StepLoop(ABC):
    """Base of the trainers: they say what a step, a log and the end of an epoch are."""

    def __init__(
        self,
        config: TrainingConfig,
        course: Course,
        index: RowIndex,
        *,
        reader: Reader,
        world: World,
        hooks: Hooks,
    ) -> None:
        self.config, self.course, self.reader = config, course, reader
        self.world, self.hooks, self.clip_ids_N = world, hooks, index.clip_ids_N
        self.plan = course.plan
        self.lanes = lanes_of(world.rank, world.size, self.plan.lanes)
        self.steps_per_epoch = self.plan.steps(len(index))
        self.last_step = self.steps_per_epoch * course.epochs
        self.step = 0
        self.meter = Meter(world.device)
        self.meter.keep("world_size", world.size)

    def _optimise(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        state_of_failure: Callable[[], dict[str, Any]],
        way_on: str,
    ) -> None:
        """To be called once the parameters are on their device; for the rest see FiniteSteps."""
        self.optimizer = make_optimizer(
            named_parameters, self.course.optim, fused=self.world.runs_ahead
        )
        self.steps = FiniteSteps(
            self.optimizer,
            self.clip_ids_N,
            self.world,
            keep=lambda content: self.hooks.failed(content),
            state=state_of_failure,
            way_on=way_on,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; loads with weights_only=True. Collective."""
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state_dict(),
            **self._own_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint. Collective."""
        self._load_own_state(state)
        restore_optimizer(self.optimizer, state["optimizer"], self.world.runs_ahead)
        self.meter.load_state_dict(state["meter"])
        self.step = state["step"]

    def _train(self, until_epoch: int) -> None:
        """Every step from `self.step` on."""
        first_epoch, first_step = divmod(self.step, self.steps_per_epoch)
        epochs = [
            EpochReads(epoch, first_step if epoch == first_epoch else 0, self._frames(epoch))
            for epoch in range(first_epoch, until_epoch)
        ]
        batches = self._batches(epochs)
        while self.step < self.last_step:
            with self.meter.timed("data_wait"):
                batch = next(batches)
            self._train_step(batch)
            self.step += 1
            self._after_step()

    def _batches(self, epochs: list[EpochReads]) -> Iterator[DeviceBatch]:
        """The steps of these epochs, read ahead."""
        return on_device(self.reader.stream(epochs), self.world.device)

    def _start_gradients(self) -> None:
        course = self.course
        lr = learning_rate(course.optim, self.step, self.steps_per_epoch, course.epochs)
        set_learning_rate(self.optimizer, lr)
        self.meter.keep("lr", lr)
        self.optimizer.zero_grad(set_to_none=True)

    def _take_step(
        self, module: nn.Module, read: Batch, loss: Tensor, outputs: tuple[Tensor, ...]
    ) -> Tensor:
        """With clipped gradients. Returns: their norm before. Raises: NonFiniteLoss."""
        limit = self.course.optim.clip_norm
        norm = nn.utils.clip_grad_norm_(
            module.parameters(), limit if limit is not None else float("inf")
        )
        self.steps.take(StepTaken(self.step, read, loss, norm, outputs))
        return norm

    def _after_step(self) -> None:
        at_epoch_end = self.step % self.steps_per_epoch == 0
        schedule = self.config.pretrain
        if at_epoch_end or self.step % self.config.confusion.update_steps == 0:
            self._update_confusion()
        leaving = False
        if at_epoch_end or self.step % schedule.log_every == 0:
            self._log(at_epoch_end)
            leaving = self.hooks.leaving()
        if at_epoch_end:
            self._end_epoch()
        if at_epoch_end or leaving or self.step % schedule.checkpoint_every == 0:
            with self.meter.timed("checkpoint"):
                self.steps.settle()
                self.hooks.save(self.state_dict())

    def _log(self, at_epoch_end: bool) -> None:
        measured = self._measured(at_epoch_end)
        metrics = self.meter.flush(self.step, self.plan.batch_size)
        metrics["epoch"] = self.step / self.steps_per_epoch
        metrics |= measured
        if self.world.rank == 0:
            self.hooks.log(self.step, metrics)

    @abstractmethod
    def _frames(self, epoch: int) -> FrameDraw:
        """What is read of each clip."""

    @abstractmethod
    def _train_step(self, batch: DeviceBatch) -> None:
        """Gradients and weights of step `self.step`."""

    @abstractmethod
    def _update_confusion(self) -> None:
        """From what was summed since the last time. Collective."""

    @abstractmethod
    def _measured(self, at_epoch_end: bool) -> dict[str, float]:
        """Metrics beside the meter's. Collective."""

    @abstractmethod
    def _end_epoch(self) -> None:
        """After its log, before its checkpoint. Collective."""

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the loop's. Collective."""

    @abstractmethod
    def _load_own_state(self, state: dict[str, Any]) -> None:
        """Take `_own_state` over. Collective."""
