"""Does the baseline learn what CAV-MAE learns: its published code and our trainers, step by step.

    python benchmarks/cavmae_side_by_side.py --cavmae CHECKOUT --timm DIR [--dim 192] [--steps 21]

CHECKOUT is github.com/YuanGongND/cav-mae, used as published; DIR holds timm 0.4.5
(`pip install --no-deps --target DIR timm==0.4.5 torchvision==0.26.0`). Ours is `Pretrainer` and
`Finetuner` with the settings of configs/cavmae.yaml, whole: reader, augmentation, masks, schedule,
optimiser. The reference starts from the same weights and gets, step by step, the views, masking
noise and targets that ours has drawn; its models, losses, optimiser (Adam with its two groups) and
metrics are its own. Its GPUs are our lanes: each contrasts its own clips, and losses are summed
over GPUs there, averaged here. Full precision on a CPU; the learning rate is that of the recipe.

Reported: relative difference of the loss at step 0 (wanted: <= 1e-5) and at the last of `--steps`
steps (<= 1 %); accuracy and mAP of equal scores (wanted: equal). The published widths are
`--dim 768 --heads 12 --decoder-dim 512 --decoder-depth 8`; the depth is always theirs. Negative
control: where other tokens are hidden from the reference the losses must differ.
"""

import argparse
import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from trunk import reference_models

from diccae.config import load_config
from pipeline.config import FeatureSpec
from training.config import TrainingConfig
from training.data.order import BatchPlan, EpochReads, FrameDraw, Window, WindowPlan
from training.data.reader import Batch
from training.data.rows import RowIndex
from training.data.views import Chunk
from training.evaluation.scores import mean_average_precision, topk_accuracy
from training.loop.finetuner import Finetuner
from training.loop.hooks import Hooks, World
from training.loop.mixup import Mixed
from training.loop.pretrainer import Pretrainer
from training.model.classifier import Classifier
from training.model.encoder import Encoder, InputShape
from training.weights.files import load_weights

SPEC = FeatureSpec(n_frames=1, audio_channel="first")
SHAPE = InputShape(SPEC.fbank_frames, SPEC.n_mels, SPEC.frame_size)
N_CLASSES = 309
STEP_0, AFTER = 1e-5, 0.01


class Losses(NamedTuple):
    """Of each step, before its update."""

    theirs: list[float]
    ours: list[float]

    def apart(self, step: int) -> float:
        return abs(self.ours[step] - self.theirs[step]) / abs(self.theirs[step])


class Clips:
    """A reader without a store: clips that look and sound like their class."""

    def __init__(self, windows: WindowPlan) -> None:
        self.windows = windows

    def stream(self, epochs: Iterable[EpochReads]) -> Iterator[Batch]:
        for reads in epochs:
            for window in self.windows.windows(reads):
                yield from self._steps(window)

    def sweep(self, frames: FrameDraw) -> Iterator[Batch]:
        raise NotImplementedError("no round is made here")

    def _steps(self, window: Window) -> Iterator[Batch]:
        for places in window.places_Sn:
            made = [self._clip(int(i)) for i in window.position_W[places]]
            fbank, frames = (np.stack(part) for part in zip(*made, strict=True))
            key, labels = window.key_W[places], window.labels_WL[places]
            yield Batch(window.position_W[places], key, labels, fbank, frames)

    def _clip(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        label = int(self.windows.index.labels_N[i])
        rng, own = np.random.default_rng(label), np.random.default_rng([label, i])
        tone_M, hue_3 = rng.normal(size=SPEC.n_mels), rng.integers(60, 200, 3)
        fbank = -5 + 3 * tone_M + 2 * own.normal(size=(SPEC.fbank_frames, SPEC.n_mels))
        size = (SPEC.frame_size, SPEC.frame_size, 3)
        frames = np.clip(hue_3 + own.normal(0, 40, size), 0, 255)
        return fbank.astype(np.float16), frames.astype(np.uint8)[None]


def clips_for(config: TrainingConfig, batch: int, steps: int) -> tuple[RowIndex, Clips]:
    """One epoch of `steps` steps."""
    n = batch * steps
    rows = np.arange(n, dtype=np.int32)
    index = RowIndex(
        "memory", SPEC, ["a"], [f"class {i}" for i in range(N_CLASSES)],
        np.array([f"clip{i:06d}" for i in rows], dtype=object), rows.astype(np.uint64),
        rows[:, None] % N_CLASSES, np.zeros(n, np.int32), rows,
    )  # fmt: skip
    plan = BatchPlan.of(n, batch, config.data)
    return index, Clips(WindowPlan(index, plan, range(plan.lanes), config.seed))


def recipe(options: argparse.Namespace) -> TrainingConfig:
    """configs/cavmae.yaml on a CPU, one epoch, at the width that was asked for."""
    config = load_config("configs/cavmae.yaml")
    decoder = {"decoder_dim": options.decoder_dim, "decoder_depth": options.decoder_depth}
    size = {"dim": options.dim, "n_heads": options.heads, **decoder}
    few = {"batch_size": options.batch, "epochs": 1}
    changes = {
        "encoder": config.encoder.model_copy(update=size),
        "data": config.data.model_copy(update={"lanes": options.lanes}),
        "scale": config.scale.model_copy(update={"num_workers": 1}),
        "pretrain": config.pretrain.model_copy(
            update={**few, "precision": "fp32", "log_every": 1, "checkpoint_every": 10**6}
        ),
        "finetune": config.finetune.model_copy(update={**few, "average_from_epoch": None}),
    }
    return config.model_copy(update=changes)


def logged(losses: list[float], name: str) -> Hooks:
    """Hooks that keep the loss of every step."""

    def keep(_step: int, metrics: dict[str, float]) -> None:
        losses.append(metrics[name])

    return Hooks(keep, lambda _state: None, lambda _content: "nowhere")


def quietly(make: Callable[[], nn.Module]) -> nn.Module:
    """The reference's constructors print."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def imported(
    reference: nn.Module, model: Encoder | Classifier, classes: Sequence[str] = ()
) -> None:
    """The reference's weights into ours, by the import a user has."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(reference.state_dict(), f"{folder}/reference.pth")
        load_weights(model, f"{folder}/reference.pth", classes, classes)


def adam(reference: nn.Module, config: Any) -> torch.optim.Optimizer:
    """Its optimiser: ten times the rate for new heads, decay as an L2 term."""
    named = [(name, p) for name, p in reference.named_parameters() if p.requires_grad]
    head = [p for name, p in named if name.startswith("mlp_head")]
    base = [p for name, p in named if not name.startswith("mlp_head")]
    groups = [{"params": base}, {"params": head, "lr": config.lr * config.head_lr_scale}]
    return torch.optim.Adam(
        [group for group in groups if group["params"]],
        config.lr,
        weight_decay=5e-7,
        betas=(0.95, 0.999),
    )


def pretraining(models: Any, options: argparse.Namespace, control: bool = False) -> Losses:
    """Reconstruction and contrast with 75 % of the tokens hidden.

    Args: control: hide other tokens from the reference.
    """
    config = recipe(options)
    size = {"embed_dim": options.dim, "num_heads": options.heads}
    size |= {"decoder_embed_dim": options.decoder_dim, "decoder_depth": options.decoder_depth}
    reference = quietly(lambda: models.CAVMAE(**size, norm_pix_loss=True, tr_pos=False))
    encoder = Encoder(config.encoder, SHAPE, decoder=True)
    imported(reference, encoder)
    index, reader = clips_for(config, options.batch, options.steps)
    ours: list[float] = []
    trainer = Pretrainer(
        config, encoder, index,
        reader=reader, rounds=None, world=World(), hooks=logged(ours, "loss"),
    )  # fmt: skip
    drawn: list[Chunk] = []
    make = trainer.chunks.of

    def of(*args: Any) -> list[Chunk]:
        chunks = make(*args)
        drawn.extend(chunks)
        return chunks

    with mock.patch.object(trainer.chunks, "of", of):
        trainer.run()
    optimiser, theirs = adam(reference, config.optim), []
    for chunk in drawn:
        total = sum(_of_gpus(reference, chunk, options.lanes, control), torch.zeros(()))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        theirs.append(float(total.detach()) / options.lanes)
    return Losses(theirs, ours)


def _of_gpus(reference: nn.Module, chunk: Chunk, n: int, control: bool) -> Iterator[Tensor]:
    """The loss of each GPU's share of the batch, with the tokens of `chunk` hidden."""
    assert chunk.masks is not None
    view = chunk.views[0]
    tensors = (view.fbank_nTM, view.frames_nFCHW[:, 0], chunk.masks.audio_BL, chunk.masks.video_BL)
    for fbank, frames, audio, video in zip(*(x.chunk(n) for x in tensors), strict=True):
        # It draws the audio's noise first.
        noise = iter([1 - audio, 1 - video] if control else [audio, video])
        with mock.patch.object(torch, "rand", lambda *_shape, noise=noise, **_options: next(noise)):
            yield reference(fbank, frames, mae_loss_weight=1.0, contrast_loss_weight=0.01)[0]


def finetuning(models: Any, options: argparse.Namespace) -> Losses:
    """Cross-entropy over 309 classes with mixup, masks and label smoothing."""
    config = recipe(options)
    size = {"embed_dim": options.dim, "num_heads": options.heads}
    reference = quietly(lambda: models.CAVMAEFT(N_CLASSES, **size, modality_specific_depth=11))
    classifier = Classifier(Encoder(config.encoder, SHAPE), N_CLASSES)
    index, reader = clips_for(config, options.batch, options.steps)
    imported(reference, classifier, index.classes)
    ours: list[float] = []
    tuner = Finetuner(
        config, classifier, index,
        reader=reader, world=World(), hooks=logged(ours, "loss"),
    )  # fmt: skip
    drawn: list[Mixed] = []
    make = tuner._inputs

    def inputs(*args: Any) -> Mixed:
        drawn.append(make(*args))
        return drawn[-1]

    with mock.patch.object(tuner, "_inputs", inputs):
        tuner.run()
    optimiser, theirs = adam(reference, config.finetune.optim), []
    for mixed in drawn:
        logits = reference(mixed.fbank_nTM, mixed.frames_nFCHW[:, 0], "multimodal")
        loss = nn.functional.cross_entropy(logits, mixed.targets_nC)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        theirs.append(float(loss.detach()))
    return Losses(theirs, ours)


def evaluations(source: Path) -> dict[str, tuple[float, float]]:
    """Accuracy and mAP of the same scores: (theirs, ours)."""
    spec = importlib.util.spec_from_file_location("their_stats", source / "utilities" / "stats.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = np.random.default_rng(0)
    labels_M = np.arange(5 * N_CLASSES) % N_CLASSES
    target_MC = np.eye(N_CLASSES)[labels_M]
    frames = rng.normal(size=(10, len(labels_M), N_CLASSES)) + 2 * target_MC
    scores_MC = torch.from_numpy(frames).softmax(-1).numpy().mean(0)
    with contextlib.redirect_stdout(io.StringIO()):
        stats = module.calculate_stats(scores_MC, target_MC)
    return {
        "accuracy": (float(stats[0]["acc"]), topk_accuracy(scores_MC, labels_M)),
        "mAP": (
            float(np.mean([stat["AP"] for stat in stats])),
            mean_average_precision(scores_MC, labels_M),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cavmae", required=True, help="a checkout of cav-mae")
    parser.add_argument("--timm", help="folder that holds timm 0.4.5")
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--decoder-dim", type=int, default=128)
    parser.add_argument("--decoder-depth", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=21)
    options = parser.parse_args()
    source = Path(options.cavmae) / "src"
    models = reference_models(str(source), options.timm)
    torch.manual_seed(0)
    met = True
    print("| | theirs | ours | apart |\n|---|---|---|---|")
    for name, run in {"pretraining": pretraining, "fine-tuning": finetuning}.items():
        losses = run(models, options)
        for step, most in ((0, STEP_0), (options.steps - 1, AFTER)):
            apart = losses.apart(step)
            met &= apart <= most
            pair = f"{losses.theirs[step]:.6f} | {losses.ours[step]:.6f}"
            print(f"| {name}, loss after {step} steps | {pair} | {apart:.1e} |", flush=True)
        theirs, ours = (each[0] - each[-1] for each in losses)
        print(f"| {name}, learned in them | {theirs:.3f} | {ours:.3f} | |", flush=True)
    few = argparse.Namespace(**{**vars(options), "steps": 1})
    apart = pretraining(models, few, control=True).apart(0)
    met &= apart > STEP_0
    print(f"| control: other tokens hidden, loss after 0 steps | | | {apart:.1e} |")
    for name, (theirs, ours) in evaluations(source).items():
        met &= abs(theirs - ours) <= 1e-15
        print(f"| {name} of equal scores | {theirs!r} | {ours!r} | {abs(theirs - ours):.0e} |")
    print("all as wanted" if met else "NOT as wanted")
    raise SystemExit(not met)


if __name__ == "__main__":
    main()
