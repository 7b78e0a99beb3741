"""Finetuner: supervised fine-tuning step by step, with the confusion-aware cross-entropy.

Knows nothing of Ray, MLflow or files. Invariants: with `auxiliary`, `confusion`, smoothing and
mixup off it is plain cross-entropy on the fused stream; those of StepLoop.

Shapes: n clips of this rank, C classes.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from clustering.kmeans.label_table import NO_LABEL
from training.config import FinetuneConfig, TrainingConfig
from training.data.augment import augment_fbank, augment_frames, normalise_frames
from training.data.device import DeviceBatch
from training.data.order import BatchPlan, FrameDraw
from training.data.reader import Reader
from training.data.rows import RowIndex
from training.data.views import step_generator
from training.errors import TrainingError
from training.loop.hooks import Hooks, World
from training.loop.mixup import Mixed, meeting, mix
from training.loop.step_loop import Course, StepLoop
from training.losses.confusion import ConfusionState
from training.losses.gather import RankShare
from training.losses.terms import multi_label_loss, soft_targets, supervised_loss
from training.model.classifier import Classifier
from training.model.numerics import trunk_numerics

_WAY_ON = (
    "A lower finetune.optim.lr or finetune.optim.clip_norm usually helps: with --fresh, which "
    "begins again from the encoder."
)


class Finetuner(StepLoop):
    """Fine-tunes a classifier on the labelled rows of `index` (docs/design.md, "Fine-tuning")."""

    def __init__(
        self,
        config: TrainingConfig,
        classifier: Classifier,
        index: RowIndex,
        *,
        reader: Reader,
        world: World,
        hooks: Hooks,
    ) -> None:
        """Raises: TrainingError if a clip has no label, or more than the loss can use."""
        refuse_labels(index, config.finetune.loss)
        self.tuning, self.n_classes = config.finetune, len(index.classes)
        plan = BatchPlan.of_finetuning(len(index), config)
        course = Course(self.tuning.epochs, plan, self.tuning.optim)
        super().__init__(config, course, index, reader=reader, world=world, hooks=hooks)
        self.share = RankShare(self.plan.rows_of_workers(world.size), world.rank)
        self.classifier = classifier.to(world.device).train()
        if config.pretrain.compile:
            self.classifier.encoder.compile_blocks()
        self.model = world.wrapped(classifier)
        learned = ((n, p) for n, p in classifier.named_parameters() if p.requires_grad)
        self._optimise(learned, self.state_dict, _WAY_ON)
        self.confusion = self._uniform_confusion(index)
        self.confusion_step = 0
        """Of the last update of the confusion matrix."""
        self.averages: dict[str, Tensor] = {}
        self.n_averaged = 0

    def _uniform_confusion(self, index: RowIndex) -> ConfusionState:
        shape = (self.n_classes, self.n_classes)
        uniform_CC = torch.full(shape, 1.0 / self.n_classes, device=self.world.device)
        clips_C = torch.bincount(torch.from_numpy(index.labels_N), minlength=self.n_classes)
        own = {
            "gamma": self.tuning.confusion,
            "pseudo_counts": self.tuning.confusion_pseudo_counts,
            # A round publishes an estimate to keep; here none comes before the clips are seen.
            "update": "dynamic",
        }
        confusion = self.config.confusion.model_copy(update=own)
        return ConfusionState(uniform_CC, clips_C, confusion, self.config.seed)

    def run(self, state: dict[str, Any] | None = None) -> dict[str, float]:
        """Train to the end, from `state` if given. Returns: the metrics of the last log."""
        if state is not None:
            self.load_state_dict(state)
        self._train(self.course.epochs)
        if self.averages:
            self.classifier.load_state_dict(self.averages)
        return self.meter.last

    def _frames(self, epoch: int) -> FrameDraw:
        return FrameDraw(self.config.data.frames_per_clip)

    def _train_step(self, batch: DeviceBatch) -> None:
        epoch = self.step // self.steps_per_epoch
        with self.meter.computed("augment"):
            inputs = self._inputs(batch, epoch)
        self._start_gradients()
        with self.meter.computed("forward"):
            with trunk_numerics(self.config.pretrain, self.world.device):
                logits = self.model(inputs.fbank_nTM, inputs.frames_nFCHW)
            loss = self._loss(logits, inputs.targets_nC, epoch)
        with self.meter.computed("backward"):
            loss.backward()
        with self.meter.computed("update"):
            made = tuple(x.detach() for x in logits.values())
            norm = self._take_step(self.classifier, batch.read, loss.detach(), made)
        logits_nC = logits[self._main].detach()
        if not self.classifier.multi_label:
            posteriors_nC = self.classifier.probabilities(logits_nC)
            # Half of a clip that met another is right to be taken for the other's class.
            own_n = batch.labels_nL[:, 0].masked_fill(~inputs.is_alone_n, NO_LABEL)
            self.confusion.accumulate(posteriors_nC, own_n)
        is_hit_n = (logits_nC.argmax(1, keepdim=True) == batch.labels_nL).any(1)
        hits = is_hit_n.float().mean() * self.share.weight
        self.meter.add({"loss": loss.detach(), "grad_norm": norm, "accuracy": hits})

    @property
    def _main(self) -> str:
        """The stream that is judged; others are trained beside it."""
        return "fusion" if self.tuning.mode == "multimodal" else self.tuning.mode

    def _loss(self, logits: Mapping[str, Tensor], targets_nC: Tensor, epoch: int) -> Tensor:
        """This rank's part of the loss of the global batch."""
        if self.classifier.multi_label:
            losses = {s: multi_label_loss(x, targets_nC) for s, x in logits.items()}
        else:
            weighted = self.tuning.confusion > 0 and epoch >= self.tuning.confusion_after_epochs
            weights_CC = self.confusion.weights_KK if weighted else None
            losses = {s: supervised_loss(x, targets_nC, weights_CC) for s, x in logits.items()}
        main = losses.pop(self._main)
        beside = sum(losses.values(), main.new_zeros(()))
        return (main + self.tuning.auxiliary * beside) * self.share.weight

    def _inputs(self, batch: DeviceBatch, epoch: int) -> Mixed:
        """Augmented (and mixed) clips and their soft targets."""
        targets = soft_targets(batch.labels_nL, self.n_classes, self.tuning.label_smoothing)
        if self.tuning.mixup > 0:
            seeds = (self.config.seed, epoch, self.step)
            met = meeting(self.plan.batch_size, self.tuning.mixup, *seeds)
            mixed = mix(batch, targets, met, self.share)
        else:
            frames = normalise_frames(batch.frames_nFHWC)
            alone_n = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
            mixed = Mixed(batch.fbank_nTM.float(), frames, targets, alone_n)
        augment, b = self.tuning.augment, self.plan.lane_size
        fbanks, pictures = [], []
        for i, lane in enumerate(self.lanes):
            rows = slice(i * b, (i + 1) * b)
            # The last number: fine-tuning sees other views than pretraining did.
            generator = step_generator(
                self.config.seed, epoch, self.step, lane, 1, device=self.world.device
            )
            fbanks.append(
                augment_fbank(mixed.fbank_nTM[rows], augment, self.config.data, generator)
            )
            pictures.append(augment_frames(mixed.frames_nFCHW[rows], augment, generator))
        return mixed._replace(fbank_nTM=torch.cat(fbanks), frames_nFCHW=torch.cat(pictures))

    def _update_confusion(self) -> None:
        if self.classifier.multi_label:
            return
        elapsed = (self.step - self.confusion_step) / self.steps_per_epoch
        epochs_done = self.step / self.steps_per_epoch
        self.confusion.update(elapsed, epochs_done - self.tuning.confusion_after_epochs)
        self.confusion_step = self.step

    def _measured(self, at_epoch_end: bool) -> dict[str, float]:
        if self.classifier.multi_label:
            return {}
        # That of the estimate itself, which begins uniform, falls for epochs whatever is learned.
        degree = self.confusion.degree_of_seen(self.confusion_step / self.steps_per_epoch)
        return {} if math.isnan(degree) else {"confusion/mean_offdiagonal": degree}

    def _end_epoch(self) -> None:
        """Running mean of the weights from `average_from_epoch` on."""
        first = self.tuning.average_from_epoch
        if first is None or self.step // self.steps_per_epoch < first:
            return
        self.n_averaged += 1
        for name, value in self.classifier.state_dict().items():
            mean = self.averages.setdefault(name, torch.zeros_like(value))
            mean += (value - mean) / self.n_averaged

    def _own_state(self) -> dict[str, Any]:
        return {
            "classifier": dict(self.classifier.state_dict()),
            "confusion": self.confusion.state_dict(),
            "confusion_step": self.confusion_step,
            "averages": dict(self.averages),
            "n_averaged": self.n_averaged,
        }

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.classifier.load_state_dict(state["classifier"])
        self.confusion.load_state_dict(state["confusion"])
        self.confusion_step = state["confusion_step"]
        self.averages = {k: v.to(self.world.device) for k, v in state["averages"].items()}
        self.n_averaged = state["n_averaged"]


def idle_additions(tuning: FinetuneConfig) -> Iterator[str]:
    """What a config asks for and so few epochs never come to, a line each.

    Said and not refused: a few epochs of a recipe are how it is tried.
    """
    if tuning.confusion > 0 and tuning.confusion_after_epochs >= tuning.epochs:
        yield (
            f"finetune.confusion = {tuning.confusion:g} does nothing: its weights apply after "
            f"finetune.confusion_after_epochs = {tuning.confusion_after_epochs} of "
            f"finetune.epochs = {tuning.epochs}"
        )
    if tuning.average_from_epoch is not None and tuning.average_from_epoch > tuning.epochs:
        yield (
            f"finetune.average_from_epoch = {tuning.average_from_epoch} does nothing: there are "
            f"finetune.epochs = {tuning.epochs}, and the weights of the last one are kept"
        )


def refuse_labels(index: RowIndex, loss: str) -> None:
    """Raises: TrainingError naming some of the clips without a label, or with several where `loss`
    takes one, if there are any."""
    if loss == "ce" and index.has_several:
        several = index.clip_ids_N[index.labels_NL[:, 1] >= 0].tolist()
        raise TrainingError(
            f"{len(several)} clips of the train split have several labels, such as "
            f"{', '.join(several[:3])}; cross-entropy takes one: set finetune.loss to bce (and "
            "finetune.confusion to 0)"
        )
    unlabelled = index.clip_ids_N[index.labels_N < 0].tolist()
    if unlabelled:
        raise TrainingError(
            f"{len(unlabelled)} clips of the train split have no known label, such as "
            f"{', '.join(unlabelled[:3])}; fine-tuning needs one for every clip"
        )
