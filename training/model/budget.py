"""Budget: what a training step costs before it runs: parameters, FLOPs, memory, hours.

Runs the real model on tensors without data, so every stem, mask and option is counted as it will
run; knows nothing of Ray, clusters or data. Invariant: nothing is allocated and nothing trained.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.config import SIDES, STREAMS, TrainingConfig
from training.model.classifier import Classifier
from training.model.encoder import Encoder, InputShape, MaskNoise

_ADAM_BYTES = 16
"""Bytes per trainable fp32 weight: itself, its gradient, two moments."""


class Budget(NamedTuple):
    """Costs of one training step, per clip where it grows with the batch."""

    parameters: int
    """All weights, class heads included."""
    trainable: int
    """Weights the optimiser moves."""
    flops_forward: int
    """Floating-point operations of one clip's forward pass; a multiply-add is two."""
    flops_train: int
    """Forward and backward: three times the forward pass."""
    bytes_fixed: int
    """Weights, gradients, Adam moments, and under bf16 the cast weights."""
    bytes_per_clip: int
    """Activations kept for the backward pass of one clip."""

    def step_bytes(self, clips: int) -> int:
        """Memory of a step with this many clips at once on a device, allocator slack apart."""
        return self.bytes_fixed + clips * self.bytes_per_clip

    def hours(self, steps: int, seconds_per_step: float) -> float:
        """Length of a run from a measured step."""
        return steps * seconds_per_step / 3600


def pretraining_budget(config: TrainingConfig, shape: InputShape) -> Budget:
    """Costs of pretraining with this config on clips of this shape: every loss in force."""
    reconstruct, intra = config.loss.reconstruction > 0, config.loss.intra > 0
    fused = config.loss.fusion and config.rounds.labels != "none"
    streams = STREAMS if fused else SIDES
    frames = config.data.frames_per_clip
    with FakeTensorMode():
        encoder = Encoder(config.encoder, shape, decoder=reconstruct)

        def forward(clips: int) -> list[Tensor]:
            fbank, pictures = _clips(clips, shape, frames)
            masks = _noise(encoder, clips, frames, config.loss.mask_ratio) if reconstruct else None
            encoding = encoder(fbank, pictures, streams, masks, reconstruct)
            outputs = [*encoding.h.values(), *encoding.reconstruction.values()]
            if intra:
                outputs += encoder(fbank, pictures, SIDES, masks).h.values()
            return outputs

        return _measure(encoder, forward, config.pretrain.precision == "bf16")


def finetuning_budget(config: TrainingConfig, shape: InputShape, n_classes: int) -> Budget:
    """Costs of fine-tuning with this config on clips of this shape."""
    tuning = config.finetune
    with FakeTensorMode():
        encoder = Encoder(config.encoder, shape)
        auxiliary = tuning.auxiliary > 0 and tuning.mode == "multimodal"
        classifier = Classifier(encoder, n_classes, tuning.mode, auxiliary)

        def forward(clips: int) -> list[Tensor]:
            inputs = _clips(clips, shape, config.data.frames_per_clip)
            return list(classifier(*inputs).values())

        return _measure(classifier, forward, config.pretrain.precision == "bf16")


def budget_table(
    budget: Budget,
    clips_per_device: int,
    clips_at_once: int,
    steps: int,
    seconds_per_step: float | None = None,
) -> list[tuple[str, str]]:
    """Name and value of each line that `--dry-run` shows.

    Args: clips_per_device: of a batch. clips_at_once: in one forward pass, which memory is for; of
        the fewest devices that the run may have, which share the batch then.
    """
    rows = [
        ("parameters", f"{budget.parameters:,}"),
        ("trainable", f"{budget.trainable:,}"),
        ("forward per clip", f"{budget.flops_forward / 1e9:,.2f} GFLOP"),
        ("training per clip", f"{budget.flops_train / 1e9:,.2f} GFLOP"),
        ("clips per device", f"{clips_per_device:,}"),
        ("clips at once", f"{clips_at_once:,}"),
        ("memory per device", f"{budget.step_bytes(clips_at_once) / 2**30:,.2f} GiB"),
        ("steps", f"{steps:,}"),
    ]
    if seconds_per_step is not None:
        rate = budget.flops_train * clips_per_device / seconds_per_step / 1e12
        rows += [
            ("measured step", f"{seconds_per_step:,.3f} s ({rate:,.2f} TFLOP/s per device)"),
            ("estimated time", f"{budget.hours(steps, seconds_per_step):,.1f} h"),
        ]
    return rows


def _clips(clips: int, shape: InputShape, frames: int) -> tuple[Tensor, Tensor]:
    size = shape.frame_size
    fbank = torch.empty(clips, shape.fbank_frames, shape.n_mels)
    return fbank, torch.empty(clips, frames, 3, size, size)


def _noise(encoder: Encoder, clips: int, frames: int, mask_ratio: float) -> MaskNoise:
    audio, video = encoder.token_counts(frames)
    return MaskNoise(torch.empty(clips, audio), torch.empty(clips, video), mask_ratio)


def _measure(model: torch.nn.Module, forward: Callable[[int], list[Tensor]], bf16: bool) -> Budget:
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # the counter knows matrix products, not the fused attention kernel of a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward(1)
    flops = counter.get_total_flops()
    one, two = (_kept_bytes(model, forward, clips, bf16) for clips in (1, 2))
    fixed = _ADAM_BYTES * trainable + 4 * (parameters - trainable) + max(2 * one - two, 0)
    return Budget(parameters, trainable, flops, 3 * flops, fixed, two - one)


def _kept_bytes(
    model: torch.nn.Module, forward: Callable[[int], list[Tensor]], clips: int, bf16: bool
) -> int:
    """Bytes autograd keeps after a forward pass, the weights themselves left out."""
    with _kept_tensors() as kept, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = forward(clips)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    del outputs
    return sum(size for storage, size in kept.items() if storage not in own)


@contextmanager
def _kept_tensors() -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd saves inside the block, by its identity."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield kept
