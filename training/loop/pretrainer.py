"""Pretraining, step by step: batches and labels in, an encoder out.

Knows nothing of Ray, MLflow or files: it is given a reader, a `Rounds`, and two callbacks.
Invariants: a step depends on the config, the weights and the planned clips alone, so a run resumed
from any checkpoint equals the uninterrupted one; the global batch, its negatives and the schedule
are the same whatever the number of workers.

Shapes: B clips of this rank, n of a chunk, V lanes.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clustering.rounds.protocol import Rounds
from training.config import TrainingConfig
from training.data.augment import normalise_fbank, normalise_frames
from training.data.batches import Batch, BatchPlan, RowIndex, Views, lanes_of
from training.data.reader import EpochReads, Reader
from training.data.views import Chunk, ViewMaker
from training.errors import NonFiniteLoss
from training.loop.labelling import Labelling
from training.loop.meter import Meter
from training.loop.schedule import learning_rate, make_optimizer, set_learning_rate
from training.losses.gather import RankShare
from training.losses.objective import Embeddings, Labels, Phase, PretrainPass, Total, total_loss
from training.model.encoder import Encoder
from training.model.numerics import trunk_numerics

log = logging.getLogger(__name__)


class World(NamedTuple):
    """This worker among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")


class Hooks(NamedTuple):
    """What the trainer tells its surroundings."""

    log: Callable[[int, dict[str, float]], None]
    """(step, metrics), on rank 0."""
    save: Callable[[dict[str, Any]], None]
    """A checkpoint, on every rank at the same step."""
    failed: Callable[[dict[str, Any]], str]
    """What to keep of a step whose loss is not finite; returns where it is."""
    leaving: Callable[[], bool] = lambda: False
    """Whether a node has just been announced to go; asked by every rank at each log."""


class Pretrainer:
    """DICCAE pretraining on the rows of `index` (DESIGN sections 5 and 6)."""

    def __init__(
        self,
        config: TrainingConfig,
        encoder: Encoder,
        index: RowIndex,
        reader: Reader,
        rounds: Rounds | None,
        world: World,
        hooks: Hooks,
    ) -> None:
        self.config, self.index, self.reader, self.rounds = config, index, reader, rounds
        self.world, self.hooks = world, hooks
        self.plan = BatchPlan.of(len(index), config.pretrain.batch_size, config.data)
        self.lanes = lanes_of(world.rank, world.size, self.plan.lanes)
        self.meter = Meter(world.device)
        self.meter.keep("world_size", world.size)
        timed = functools.partial(self.meter.computed, "gather")
        self.share = RankShare(self.plan.rows_of_workers(world.size), world.rank, timed)
        self.steps_per_epoch = self.plan.steps(len(index))
        self.total_steps = self.last_step = self.steps_per_epoch * config.pretrain.epochs
        self.encoder = encoder.to(world.device)
        if config.pretrain.compile:
            self.encoder.compile_blocks()
        self.model = PretrainPass(self.encoder, config.loss)
        self.views = ViewMaker(config, self.encoder, self.plan, self.lanes, world.device)
        self.optimizer = make_optimizer(self.encoder.named_parameters(), config.optim)
        order = np.argsort(index.keys_N)
        truth = (index.keys_N[order], index.labels_N[order])
        self.labelling = Labelling(
            config, rounds, config.pretrain.batch_size, len(index), truth, world.device
        )
        self.step = 0
        self.phase: Phase | None = None
        self.wrapped: nn.Module = self.model
        self.clustering_s = 0.0

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
            EpochReads(epoch, first_step if epoch == first_epoch else 0, self._views(epoch))
            for epoch in range(first_epoch, last_epoch)
        ]
        batches = self.reader.stream(epochs)
        while self.step < self.last_step:
            with self.meter.timed("stall"):
                self._switch_labels()
            with self.meter.timed("data_wait"):
                batch = next(batches)
            self._train_step(batch)
            self.step += 1
            self._after_step()
        return self.meter.last

    def _views(self, epoch: int) -> Views:
        return Views(self.config.data.frames_per_clip, 2 if self._intra(epoch) else 1)

    def _intra(self, epoch: int) -> bool:
        loss = self.config.loss
        return loss.intra > 0 and (loss.intra_epochs is None or epoch < loss.intra_epochs)

    def _after_step(self) -> None:
        at_epoch_end = self.step % self.steps_per_epoch == 0
        confusion = self.config.confusion
        if at_epoch_end or self.step % confusion.update_steps == 0:
            self._update_confusion()
        leaving = False
        if at_epoch_end:
            self._log()
            self._maybe_start_round()
        elif self.step % self.config.pretrain.log_every == 0:
            self._log()
            leaving = self.hooks.leaving()
        if at_epoch_end or leaving or self.step % self.config.pretrain.checkpoint_every == 0:
            with self.meter.timed("checkpoint"):
                self.hooks.save(self.state_dict())

    def _log(self) -> None:
        metrics = self.meter.flush(self.step, self.config.pretrain.batch_size)
        metrics["epoch"] = self.step / self.steps_per_epoch
        metrics |= self.labelling.metrics()
        if self.world.rank == 0:
            self.hooks.log(self.step, metrics)

    def _train_step(self, batch: Batch) -> None:
        epoch = self.step // self.steps_per_epoch
        self._enter_phase(epoch)
        assert self.phase is not None
        with self.meter.computed("augment"):
            chunks = self.views.chunks(batch, epoch, self.step)
            labels = self.labelling.of(batch["key"])
        lr = learning_rate(
            self.config.optim, self.step, self.steps_per_epoch, self.config.pretrain.epochs
        )
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        forward = self._whole if len(chunks) == 1 else self._cached
        embeddings, total, reconstruction = forward(chunks, labels)
        with self.meter.computed("update"):
            norm = self._clip()
            loss = total.loss.detach() + self.config.loss.reconstruction * reconstruction.detach()
            stop_if_not_finite(self, batch, loss, norm)
            self.optimizer.step()
            for head, posteriors in zip(labels, total.posteriors, strict=True):
                head.confusion.accumulate(posteriors, head.labels_B)
        self.meter.add({"loss": loss, "grad_norm": norm, **total.parts})
        if self.config.loss.reconstruction > 0:
            self.meter.add({"loss_reconstruction": reconstruction.detach()})
        if labels:
            labelled = (labels[0].labels_B >= 0).float().mean()
            self.meter.add({"labelled_frac": labelled * self.share.weight})
        self.meter.keep("lr", lr)
        if self._pushes():
            with self.meter.timed("push"):
                self._push(batch["key"], embeddings)

    def _enter_phase(self, epoch: int) -> None:
        """Freeze and thaw at the start of a phase, and wrap anew for DDP."""
        labelled = self.labelling.labelled
        fusion = self.config.loss.fusion and (labelled or self._pushes())
        phase = Phase(self._intra(epoch), labelled, fusion)
        if phase == self.phase:
            return
        self.phase = phase
        self.model.set_phase(phase)
        self.wrapped = self.model
        if self.world.size > 1:
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.model, device_ids=ids)

    def _numerics(self) -> contextlib.AbstractContextManager:
        return trunk_numerics(self.config.pretrain, self.world.device)

    def _whole(self, chunks: list[Chunk], labels: list[Labels]) -> tuple[Embeddings, Total, Tensor]:
        views, masks = chunks[0]
        with self.meter.computed("forward"), self._numerics():
            embeddings, reconstruction = self.wrapped(views, self.phase, masks)
        with self.meter.computed("loss"):
            reconstruction = reconstruction * self.share.weight
            total = total_loss(embeddings, labels, self.config.loss, self.share)
        with self.meter.computed("backward"):
            (total.loss + self.config.loss.reconstruction * reconstruction).backward()
        return embeddings, total, reconstruction

    def _cached(
        self, chunks: list[Chunk], labels: list[Labels]
    ) -> tuple[Embeddings, Total, Tensor]:
        """Cached gradients: embed all chunks without a graph, take the loss's gradient on the
        embeddings, then run each chunk again with it."""
        with self.meter.computed("forward"), torch.no_grad(), self._numerics():
            parts = [self.model(views, self.phase, masks)[0] for views, masks in chunks]
        leaves = {name: torch.cat([p[name] for p in parts]).requires_grad_() for name in parts[0]}
        with self.meter.computed("loss"):
            total = total_loss(leaves, labels, self.config.loss, self.share)
        with self.meter.computed("backward"):
            total.loss.backward()
            reconstruction = self._replay(chunks, leaves)
        return leaves, total, reconstruction

    def _replay(self, chunks: list[Chunk], leaves: Embeddings) -> Tensor:
        weight = self.config.loss.reconstruction
        reconstruction = leaves["z.audio"].new_zeros(())
        start = 0
        for i, (views, masks) in enumerate(chunks):
            last = i == len(chunks) - 1
            quiet = contextlib.nullcontext() if last else _no_sync(self.wrapped)
            with quiet:
                with self._numerics():
                    embeddings, error = self.wrapped(views, self.phase, masks)
                n = len(embeddings["z.audio"])
                share = n / len(leaves["z.audio"]) * self.share.weight
                surrogate = weight * share * error
                for name, x in embeddings.items():
                    gradient = leaves[name].grad
                    if gradient is not None and x.requires_grad:
                        surrogate = surrogate + (x * gradient[start : start + n]).sum()
                surrogate.backward()
            reconstruction = reconstruction + share * error.detach()
            start += n
        return reconstruction

    def _clip(self) -> Tensor:
        limit = self.config.optim.clip_norm
        parameters = [p for p in self.encoder.parameters() if p.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, limit if limit is not None else float("inf"))

    def _pushes(self) -> bool:
        """Whether the features of this step go to the bank."""
        rounds = self.config.rounds
        if self.rounds is None or rounds.labels == "none" or rounds.features != "train":
            return False
        return self.step // self.steps_per_epoch >= rounds.warmup_epochs - 1

    def _push(self, keys_B: np.ndarray, embeddings: Embeddings) -> None:
        assert self.rounds is not None
        streams = self.config.loss.label_streams
        rows = torch.cat([embeddings[f"h.{s}"].detach() for s in streams], dim=1)
        self.rounds.push(keys_B, rows.half().cpu().numpy(), self.step)

    def _switch_labels(self) -> None:
        waited = self.labelling.apply_if_due(self.step)
        if waited is not None:
            self.clustering_s += waited
            log.info("step %d: labels of round %d apply", self.step, self.labelling.round)

    def _maybe_start_round(self) -> None:
        if self.step == self.last_step:
            return
        epochs_done = self.step // self.steps_per_epoch
        loss_instance = self.meter.epoch_mean("loss_instance")
        if not self.labelling.wants_round(epochs_done, loss_instance):
            return
        assert self.rounds is not None
        with self.meter.timed("stall"):
            if self.config.rounds.features == "pass":
                self._evaluation_pass()
            self.rounds.flush(self.config.rounds.timeout_s)
            barrier(self.world)
            request = self.labelling.request(self.step, self.total_steps - 1)
            if self.world.rank == 0:
                self.rounds.start(request)
            barrier(self.world)

    @torch.no_grad()
    def _evaluation_pass(self) -> None:
        """Push the features of every clip, from middle frames and without augmentation."""
        assert self.rounds is not None
        self.encoder.eval()
        for batch in self.reader.sweep(Views(self.config.data.frames_per_clip, random=False)):
            fbank = torch.from_numpy(batch["fbank"]).to(self.world.device)
            frames = torch.from_numpy(batch["frames"]).to(self.world.device)
            with self._numerics():
                h = self.encoder(
                    normalise_fbank(fbank, self.config.data),
                    normalise_frames(frames),
                    self.config.loss.label_streams,
                ).h
            self._push(batch["key"], {f"h.{s}": x for s, x in h.items()})
        self.encoder.train()

    def _update_confusion(self) -> None:
        if self.labelling.first_step is None:
            return
        interval = self.step % self.steps_per_epoch % self.config.confusion.update_steps
        elapsed = (interval or self.config.confusion.update_steps) / self.steps_per_epoch
        since = (self.step - self.labelling.first_step) / self.steps_per_epoch
        for active in self.labelling.heads:
            active.confusion.update(elapsed, since)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; loads with weights_only=True."""
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "encoder": {k: v.detach().cpu() for k, v in self.encoder.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "labelling": self.labelling.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint; a round that was pending is asked for again."""
        self.encoder.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.labelling.load_state_dict(state["labelling"])
        self.meter.load_state_dict(state["meter"])
        self.step = state["step"]
        pending = self.labelling.pending
        if pending is not None and self.rounds is not None:
            if self.world.rank == 0:
                self.rounds.start(pending)
            barrier(self.world)


def barrier(world: World) -> None:
    """Wait for all workers."""
    if world.size > 1:
        dist.barrier()


class Stepper(Protocol):
    """What a failed step is saved from."""

    step: int
    index: RowIndex
    world: World
    hooks: Hooks

    def state_dict(self) -> dict[str, Any]:
        """The state before the optimiser's step."""
        ...


def stop_if_not_finite(trainer: Stepper, batch: Batch, loss: Tensor, norm: Tensor) -> None:
    """Raises: NonFiniteLoss, after saving step and batch for replay; the weights are still good."""
    if bool(torch.isfinite(loss + norm)):
        return
    clip_ids = trainer.index.clip_ids_N[batch["position"]].tolist()
    where = trainer.hooks.failed(
        {
            "step": trainer.step,
            "rank": trainer.world.rank,
            "clip_ids": clip_ids,
            "state": trainer.state_dict(),
            "batch": {
                name: torch.from_numpy(np.array(x.view(np.int64) if x.dtype == np.uint64 else x))
                for name, x in batch.items()
            },
        }
    )
    raise NonFiniteLoss(
        f"step {trainer.step}, rank {trainer.world.rank}: loss {float(loss)}, gradient norm "
        f"{float(norm)}; clips {', '.join(clip_ids[:8])}, ... The step is saved in {where} for "
        "replay. A lower optim.lr or optim.clip_norm usually helps."
    )


def _no_sync(module: nn.Module) -> contextlib.AbstractContextManager:
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
