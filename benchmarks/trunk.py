"""A step of our trunk against a step of the published CAV-MAE, equal shapes, weights and batch.

Both sides run forward and backward (no optimiser) in turns within one process; the figure is the
ratio of the medians, in CPU time on a CPU and in wall time on a GPU. The reference runs as it is
published, from a checkout of github.com/YuanGongND/cav-mae (its `src` folder), on timm 0.4.5
(`pip install --no-deps --target DIR timm==0.4.5 torchvision==0.26.0`). The losses of both are
compared before anything is timed.

    python benchmarks/trunk.py --reference cav-mae/src --timm DIR
    python benchmarks/trunk.py --reference cav-mae/src --timm DIR --device cuda --dtype bf16
"""

import argparse
import contextlib
import importlib
import io
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.config import STREAMS, EncoderConfig
from training.losses.terms import info_nce
from training.model.classifier import Classifier
from training.model.encoder import Encoder, InputShape, MaskNoise
from training.weights.files import load_weights

Step = Callable[[], Tensor]
_SHAPE = InputShape(fbank_frames=1024, n_mels=128, frame_size=224)
_CLASSES = [f"class {i}" for i in range(309)]


def reference_models(source: str, timm: str | None) -> types.ModuleType:
    """The reference's `models` package, imported with what its time had and ours has not."""
    six = types.ModuleType("torch._six")
    six.container_abcs = __import__("collections.abc").abc  # type: ignore[attr-defined]
    sys.modules.setdefault("torch._six", six)
    np.float = float  # type: ignore[attr-defined]
    sys.path[:0] = [source, *([timm] if timm else [])]
    return importlib.import_module("models")


def pretraining_steps(models: Any, batch: int, device: str, folder: str) -> tuple[Step, Step]:
    """MAE + 0.01 * InfoNCE with 75 % masked: (reference, ours)."""
    with contextlib.redirect_stdout(io.StringIO()):
        reference = models.CAVMAE(norm_pix_loss=True).to(device)
    ours = Encoder(EncoderConfig(preset="base"), _SHAPE, decoder=True).to(device)
    torch.save(reference.state_dict(), f"{folder}/reference.pth")
    load_weights(ours, f"{folder}/reference.pth")
    ours.train_only(STREAMS, class_heads=False)
    fbank, frames = _clips(batch, device)
    audio, video = (torch.rand(batch, n, device=device) for n in ours.token_counts())

    def their_step() -> Tensor:
        # both sides must hide the same tokens: the reference draws audio first, then video
        draws = iter((audio, video))
        with _patched(torch, "rand", lambda *shape, **options: next(draws)):
            loss: Tensor = reference(fbank, frames[:, 0])[0]
        return loss

    def our_step() -> Tensor:
        hidden = MaskNoise(audio, video, 0.75)
        encoding = ours(fbank, frames, STREAMS, hidden, reconstruct=True)
        contrast = info_nce(encoding.z["audio"], encoding.z["video"], 0.05, "v2a", "local")
        errors = torch.stack(list(encoding.reconstruction.values()))
        return errors.sum() + 0.01 * contrast.loss

    return _backward(reference, their_step), _backward(ours, our_step)


def finetuning_steps(models: Any, batch: int, device: str, folder: str) -> tuple[Step, Step]:
    """Multimodal cross-entropy over 309 classes: (reference, ours)."""
    with contextlib.redirect_stdout(io.StringIO()):
        reference = models.CAVMAEFT(len(_CLASSES)).to(device)
    ours = Classifier(Encoder(EncoderConfig(preset="base"), _SHAPE), len(_CLASSES)).to(device)
    torch.save(reference.state_dict(), f"{folder}/reference.pth")
    load_weights(ours, f"{folder}/reference.pth", _CLASSES, _CLASSES)
    fbank, frames = _clips(batch, device)
    labels = torch.arange(batch, device=device)

    def their_step() -> Tensor:
        logits = reference(fbank, frames[:, 0], "multimodal")
        return nn.functional.cross_entropy(logits, labels)

    def our_step() -> Tensor:
        return nn.functional.cross_entropy(ours(fbank, frames)["fusion"], labels)

    return _backward(reference, their_step), _backward(ours, our_step)


def measure(steps: tuple[Step, Step], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of both in turns, and ours over theirs; the first turn is not counted."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for step, times in zip(steps, seconds, strict=True):
            _finish(device)
            start = clock()
            step()
            _finish(device)
            if turn:
                times.append(clock() - start)
    theirs, ours = (statistics.median(times) for times in seconds)
    pairs = [mine / other for other, mine in zip(*seconds, strict=True)]
    return {
        "reference_s": round(theirs, 4),
        "ours_s": round(ours, 4),
        "ratio": round(ours / theirs, 3),
        "ratio_min": round(min(pairs), 3),
        "ratio_max": round(max(pairs), 3),
    }


def _backward(model: nn.Module, loss: Step) -> Step:
    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value.detach()

    return step


def _clips(batch: int, device: str) -> tuple[Tensor, Tensor]:
    fbank = torch.randn(batch, _SHAPE.fbank_frames, _SHAPE.n_mels, device=device)
    size = _SHAPE.frame_size
    return fbank, torch.randn(batch, 1, 3, size, size, device=device)


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Any:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print one JSON line for each kind of step."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", required=True, help="`src` folder of a cav-mae checkout")
    parser.add_argument("--timm", help="folder that holds timm 0.4.5")
    parser.add_argument("--steps", nargs="+", default=["pretrain", "finetune"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = reference_models(arguments.reference, arguments.timm)
    kinds = {"pretrain": pretraining_steps, "finetune": finetuning_steps}
    for name in arguments.steps:
        torch.manual_seed(0)
        with (
            tempfile.TemporaryDirectory() as folder,
            torch.autocast(arguments.device, torch.bfloat16, arguments.dtype == "bf16"),
        ):
            steps = kinds[name](models, arguments.batch, arguments.device, folder)
            losses = [step().item() for step in steps]
            tolerance = 1e-3 if arguments.dtype == "fp32" else 3e-2
            if abs(losses[0] - losses[1]) > tolerance * abs(losses[0]):
                raise SystemExit(f"{name}: losses differ, nothing was timed: {losses}")
            result = measure(steps, arguments.repeats, arguments.device)
        line = {"step": name, "batch": arguments.batch, "device": arguments.device}
        line |= {"dtype": arguments.dtype, "losses": losses, **result}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
