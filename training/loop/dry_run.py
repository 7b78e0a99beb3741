"""What a pretraining run would cost, before it is started.

Composes the budget with one measured step on this machine; knows nothing of Ray.
Invariant: reads no clip and writes nothing.
"""

import time

import torch

from pipeline.config import FeatureSpec
from training.config import TrainingConfig
from training.data.order import BatchPlan
from training.data.views import View
from training.loop.budget import budget_table, pretraining_budget
from training.losses.objective import Phase, PretrainPass, total_loss
from training.model.encoder import MaskNoise
from training.model.make import input_shape, make_encoder
from training.model.numerics import trunk_numerics

_CPU_CLIPS = 4
"""Clips of the measured step on a CPU; its time is taken as linear in them."""


def dry_run(config: TrainingConfig, spec: FeatureSpec, n_clips: int) -> list[tuple[str, str]]:
    """Name and value of each line to show."""
    plan = BatchPlan.of(n_clips, config.pretrain.batch_size, config.data)
    per_worker = plan.batch_size // config.scale.num_workers
    at_once = min(per_worker, config.pretrain.micro_batch or per_worker)
    budget = pretraining_budget(config, input_shape(spec))
    steps = plan.steps(n_clips) * config.pretrain.epochs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = at_once if device.type == "cuda" else min(at_once, _CPU_CLIPS)
    # cached gradients embed every clip once more, without a graph: a third of a step
    passes = 1.0 if at_once == per_worker else 4 / 3
    seconds = _step_seconds(config, spec, measured, device) / measured * per_worker * passes
    rows = budget_table(budget, per_worker, steps, seconds)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one CPU process, here"
    return [*rows, ("measured on", f"{where}, {measured} clips at once")]


def _step_seconds(
    config: TrainingConfig, spec: FeatureSpec, clips: int, device: torch.device
) -> float:
    """Wall time of a forward and backward pass on random clips, the second of two."""
    encoder = make_encoder(config, spec).to(device)
    model = PretrainPass(encoder, config.loss)
    frames_per_clip = config.data.frames_per_clip
    n = max(2, clips)
    view = View(
        torch.randn(n, spec.fbank_frames, spec.n_mels, device=device),
        torch.randn(n, frames_per_clip, 3, spec.frame_size, spec.frame_size, device=device),
    )
    masks = None
    if config.loss.reconstruction > 0:
        audio, video = (
            torch.rand(n, m, device=device) for m in encoder.token_counts(frames_per_clip)
        )
        masks = MaskNoise(audio, video, config.loss.mask_ratio)
    phase = Phase(intra=False, labelled=False, fusion=False)
    model.set_phase(phase)
    for _ in range(2):
        started = time.perf_counter()
        with trunk_numerics(config.pretrain, device):
            embeddings, reconstruction = model([view], phase, masks)
        loss = total_loss(embeddings, [], config.loss).loss
        (loss + config.loss.reconstruction * reconstruction).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds * clips / n
