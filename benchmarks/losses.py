"""What DICCAE's own terms cost beside a base-size step: gather, contrast, L_cls, L_conf, C.

On a CPU the terms run on two gloo ranks (so the gather is real) with their share of the global
batch; on a GPU on one. The base-size step is forward and backward of the pretraining pass with 75 %
masked, timed on a few clips and multiplied: it is linear in the batch, the terms are not. Wall time
of the slowest rank against wall time of the step. Pushing features is timed by the clustering
benchmarks.

    python benchmarks/losses.py
    python benchmarks/losses.py --device cuda --dtype bf16 --step-clips 64
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from training.config import STREAMS, ConfusionConfig, EncoderConfig
from training.losses.confusion import ConfusionState
from training.losses.terms import class_alignment, confusion_loss, info_nce, labelled_rows
from training.model.encoder import Encoder, InputShape, MaskNoise

_SHAPE = InputShape(fbank_frames=1024, n_mels=128, frame_size=224)
_WIDTH, _PROJECTION, _UPDATE_EVERY = 768, 256, 10


def terms_seconds(clips: int, classes: int, repeats: int, device: str) -> float:
    """Median wall seconds of all terms, forward and backward, for this rank's clips."""
    torch.manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, device=device), dim=-1)

    # By plain names: a mapping of literal ones is of another type to mypy.
    streams: tuple[str, ...] = STREAMS
    z = {s: torch.randn(clips, _WIDTH, device=device, requires_grad=True) for s in streams}
    h = {s: unit(clips, _PROJECTION).requires_grad_() for s in streams}
    prototypes = {s: unit(classes, _PROJECTION) for s in streams}
    confusion = torch.softmax(torch.randn(classes, classes, device=device), 1)
    state = ConfusionState(confusion, torch.ones(len(confusion)), ConfusionConfig())
    labels = torch.randint(classes, (clips,), device=device)

    def step(number: int) -> None:
        rows = labelled_rows(labels)
        conf = confusion_loss(h, prototypes, labels, 0.1, state.weights_KK, STREAMS, rows=rows)
        loss = conf.loss + class_alignment(h, prototypes, labels, 0.1, STREAMS, rows=rows)
        for x in (z, h):
            loss = loss + info_nce(x["audio"], x["video"], 0.05, "both", "global").loss
        loss.backward()
        state.accumulate(conf.posteriors_BK, labels)
        if number % _UPDATE_EVERY == 0:
            state.update(0.01, since_labels_epochs=1)

    def ten() -> None:
        for number in range(_UPDATE_EVERY):
            step(number)

    # ten steps at a time, so that the update of the confusion matrix counts for its share
    tens = [timed(ten, device) for _ in range(repeats)]
    return statistics.median(tens[1:]) / _UPDATE_EVERY


def step_seconds_per_clip(clips: int, repeats: int, device: str, bf16: bool) -> float:
    """Median wall seconds of a base-size pretraining pass, forward and backward, per clip."""
    encoder = Encoder(EncoderConfig(preset="base"), _SHAPE, decoder=True).to(device)
    fbank = torch.randn(clips, _SHAPE.fbank_frames, _SHAPE.n_mels, device=device)
    frames = torch.randn(clips, 1, 3, _SHAPE.frame_size, _SHAPE.frame_size, device=device)
    audio, video = (torch.rand(clips, n, device=device) for n in encoder.token_counts())
    noise = MaskNoise(audio, video, 0.75)

    def step() -> None:
        encoder.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, bf16):
            encoding = encoder(fbank, frames, STREAMS, noise, reconstruct=True)
        parts = [*encoding.reconstruction.values(), *(h.sum() for h in encoding.h.values())]
        torch.stack(parts).sum().backward()

    return statistics.median([timed(step, device) for _ in range(repeats)][1:]) / clips


def timed(work: Callable[[], Any], device: str) -> float:
    """Wall seconds of one call, the device idle before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _rank(rank: int, ranks: int, folder: str, clips: int, classes: int, repeats: int) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    seconds = terms_seconds(clips, classes, repeats, "cpu")
    torch.save(seconds, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_ranks(ranks: int, batch: int, classes: int, repeats: int) -> float:
    """Seconds of the terms on the slowest of some gloo ranks that share the batch."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, batch // ranks, classes, repeats)
        group = [context.Process(target=_rank, args=(r, *arguments)) for r in range(ranks)]
        for process in group:
            process.start()
        for process in group:
            process.join()
        seconds = [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in range(ranks)]
    return float(max(seconds))


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="global batch of the terms")
    parser.add_argument("--classes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--step-clips", type=int, default=2, help="clips of the timed step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    arguments = parser.parse_args()
    device, ranks = arguments.device, 2 if arguments.device == "cpu" else 1
    if device == "cpu":
        terms = on_ranks(ranks, arguments.batch, arguments.classes, arguments.repeats)
        torch.set_num_threads(1)
    else:
        terms = terms_seconds(arguments.batch, arguments.classes, arguments.repeats, device)
    bf16 = arguments.dtype == "bf16"
    per_clip = step_seconds_per_clip(arguments.step_clips, 3, device, bf16)
    step = per_clip * arguments.batch / ranks
    line = {"batch": arguments.batch, "classes": arguments.classes, "ranks": ranks}
    line |= {"device": device, "dtype": arguments.dtype, "terms_s": round(terms, 5)}
    print(json.dumps({**line, "step_s": round(step, 3), "share": round(terms / step, 5)}))


if __name__ == "__main__":
    main()
