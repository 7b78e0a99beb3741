"""dry_run: what pretraining or fine-tuning would cost, before it is started.

Composes the budget with one measured step on this machine; knows nothing of Ray.
Invariant: reads no clip and writes nothing.
"""

import time
from typing import NamedTuple

import torch
from torch.nn import functional as F

from pipeline.config import FeatureSpec
from training.cluster_config import ScaleConfig
from training.config import TrainingConfig
from training.data.order import BatchPlan
from training.data.views import Chunk, View
from training.loop.gradients import Gradients
from training.loop.hooks import World
from training.loop.meter import Meter
from training.losses.confusion import ConfusionState
from training.losses.gather import RankShare
from training.losses.objective import Labels, Phase
from training.model.budget import budget_table, finetuning_budget, pretraining_budget
from training.model.encoder import MaskNoise
from training.model.make import input_shape, make_encoder

_CPU_CLIPS = 4
"""Clips of the measured step on a CPU; its time is taken as linear in them."""


class _Load(NamedTuple):
    """Clips of one worker."""

    per_step: int
    """Of its share of a batch, at most."""
    at_once: int
    """In one forward pass."""


def dry_run(config: TrainingConfig, spec: FeatureSpec, n_clips: int) -> list[tuple[str, str]]:
    """Name and value of each line to show of pretraining."""
    plan = BatchPlan.of(n_clips, config.pretrain.batch_size, config.data)
    load = _load(plan, config.scale.num_workers, config.pretrain.micro_batch)
    fewest = _load(plan, fewest_workers(config.scale), config.pretrain.micro_batch)
    budget = pretraining_budget(config, input_shape(spec))
    steps = plan.steps(n_clips) * config.pretrain.epochs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = load.at_once if device.type == "cuda" else min(load.at_once, _CPU_CLIPS)
    # Cached gradients embed every clip once more, without a graph: a third of a step.
    passes = 1.0 if load.at_once == load.per_step else 4 / 3
    seconds = _step_seconds(config, spec, measured, device) / measured * load.per_step * passes
    rows = budget_table(budget, load.per_step, fewest.at_once, steps, seconds)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one CPU process, here"
    rows.append(("measured on", f"{where}, {measured} clips at once"))
    return rows + _of_fewest(config.scale)


def dry_run_finetuning(
    config: TrainingConfig, spec: FeatureSpec, n_clips: int, n_classes: int
) -> list[tuple[str, str]]:
    """Name and value of each line to show of fine-tuning; nothing is measured."""
    plan = BatchPlan.of_finetuning(n_clips, config)
    budget = finetuning_budget(config, input_shape(spec), n_classes)
    steps = plan.steps(n_clips) * config.finetune.epochs
    load, fewest = (
        _load(plan, n, None) for n in (config.scale.num_workers, fewest_workers(config.scale))
    )
    return budget_table(budget, load.per_step, fewest.at_once, steps) + _of_fewest(config.scale)


def _of_fewest(scale: ScaleConfig) -> list[tuple[str, str]]:
    n = fewest_workers(scale)
    return [] if n == scale.num_workers else [("memory", f"while the workers are {n}, the fewest")]


class StepBytes(NamedTuple):
    """Memory of a step of one worker, while they are as few as may be."""

    pretrain: int
    finetune: int


def step_bytes(config: TrainingConfig, spec: FeatureSpec, n_classes: int) -> StepBytes:
    """What a worker's largest steps keep, by the budget; nothing is measured, no store read."""
    batch_size, shape = config.pretrain.batch_size, input_shape(spec)
    plans = [
        BatchPlan.of(batch_size, batch_size, config.data),
        BatchPlan.of_finetuning(config.finetune.batch_size, config),
    ]
    micro_batches, workers = (config.pretrain.micro_batch, None), fewest_workers(config.scale)
    clips = [
        _load(plan, workers, micro).at_once
        for plan, micro in zip(plans, micro_batches, strict=True)
    ]
    return StepBytes(
        pretraining_budget(config, shape).step_bytes(clips[0]),
        finetuning_budget(config, shape, n_classes).step_bytes(clips[1]),
    )


def fewest_workers(scale: ScaleConfig) -> int:
    """With how many workers a run still goes on: each then has the largest share of a batch."""
    return scale.min_workers or scale.num_workers


def _load(plan: BatchPlan, workers: int, micro_batch: int | None) -> _Load:
    per_step = max(plan.rows_of_workers(workers))
    if micro_batch is None or micro_batch >= per_step:
        return _Load(per_step, per_step)
    return _Load(per_step, max(1, micro_batch // plan.lane_size) * plan.lane_size)


def _step_seconds(
    config: TrainingConfig, spec: FeatureSpec, clips: int, device: torch.device
) -> float:
    """Wall time of a forward and backward pass on random clips, the second of two.

    As in an epoch with everything on: labels are in force, and second views are compared.
    """
    encoder = make_encoder(config, spec).to(device)
    n = max(2, clips)  # InfoNCE needs another clip.
    share = RankShare((n,), 0)
    gradients = Gradients(config, encoder, World(device=device), share, Meter(device))
    labelled = config.rounds.labels != "none"
    fusion = labelled and config.loss.fusion
    gradients.enter(Phase(config.loss.intra > 0, labelled, fusion))
    views = [_view(config, spec, n, device) for _ in range(2 if config.loss.intra > 0 else 1)]
    masks = None
    if config.loss.reconstruction > 0:
        counts = encoder.token_counts(config.data.frames_per_clip)
        audio, video = (torch.rand(n, m, device=device) for m in counts)
        masks = MaskNoise(audio, video, config.loss.mask_ratio)
    labels = [_labels(config, n, device)] if labelled else []
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        gradients.of([Chunk(views, masks)], labels)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds * clips / n


def _view(config: TrainingConfig, spec: FeatureSpec, n: int, device: torch.device) -> View:
    size = spec.frame_size
    return View(
        torch.randn(n, spec.fbank_frames, spec.n_mels, device=device),
        torch.randn(n, config.data.frames_per_clip, 3, size, size, device=device),
    )


def _labels(config: TrainingConfig, n: int, device: torch.device) -> Labels:
    """Random labels under random prototypes, whose losses cost what real ones cost."""
    streams, k = config.loss.label_streams, config.clustering.k
    prototypes: dict[str, torch.Tensor] = {
        s: F.normalize(torch.randn(k, config.encoder.projection, device=device), dim=1)
        for s in streams
    }
    uniform_KK = torch.full((k, k), 1.0 / k, device=device)
    labels_B = torch.randint(0, k, (n,), device=device)
    clips_K = torch.ones(k, device=device)
    state = ConfusionState(uniform_KK, clips_K, config.confusion)
    return Labels(labels_B, prototypes, streams, state)
