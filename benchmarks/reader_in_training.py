"""What reading costs a training thread: our Ray tasks against a Ray Data set of the same windows.

    python benchmarks/reader_in_training.py --store STORE [--epochs 14] [--steps 60]

A small network is trained on the batches while they are read. Its speed on a batch that is already
there is what nothing can beat; the readers give a share of it. The Ray Data set maps the same
function over the same windows, all of them planned beforehand, and is iterated in order.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from torch import nn

from diccae.resources import start_ray
from pipeline.store import FeatureStore
from training.batches import Batch, BatchPlan, Views, WindowReader, index_rows
from training.config import DataConfig, EncoderConfig
from training.encoder import Encoder, InputShape
from training.reader import EpochReads, RayReader, Window, WindowPlan


def decode_window(batch: Batch, reader: Any) -> Iterator[Batch]:
    """One row of the Ray Data set: a window to one block per step."""
    window_reader: WindowReader = ray.get(reader[0])
    positions = np.asarray(batch["positions"][0]).reshape(int(batch["steps"][0]), 1, -1)
    yield from window_reader.read(positions, Views(1), int(batch["epoch"][0]))


def ray_data(plan: WindowPlan, epochs: list[EpochReads], cpus: float) -> Iterator[Batch]:
    """The windows of all epochs as one data set."""
    windows: list[Window] = [w for reads in epochs for w in plan.windows(reads)]
    items = [
        {"epoch": w.epoch, "steps": len(w.positions_SVb), "positions": w.positions_SVb.ravel()}
        for w in windows
    ]
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        decode_window,
        fn_kwargs={"reader": [ray.put(WindowReader(plan.index, plan.seed))]},
        batch_size=1,
        batch_format="numpy",
        num_cpus=cpus,
        concurrency=1,
    )
    batches: Iterable[Batch] = dataset.iter_batches(
        batch_size=plan.plan.batch_size, batch_format="numpy", prefetch_batches=4
    )
    yield from batches


def steps_per_s(step: Callable[[Batch], None], batches: Iterator[Batch], n_steps: int) -> float:
    """Training steps per second after ten to warm up."""
    for _ in range(10):
        step(next(batches))
    started = time.monotonic()
    for _ in range(n_steps):
        step(next(batches))
    return n_steps / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    index = index_rows(FeatureStore.open(options.store).snapshot(), "train")
    spec = index.spec
    plan = BatchPlan.of(len(index), options.batch, DataConfig(lanes=4))
    windows = WindowPlan(index, plan, range(plan.lanes), 0)
    epochs = [EpochReads(epoch, 0, Views(1)) for epoch in range(options.epochs)]
    encoder = Encoder(
        EncoderConfig(preset="tiny"), InputShape(spec.fbank_frames, spec.n_mels, spec.frame_size)
    )
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-4)

    def step(batch: Batch) -> None:
        fbank = torch.from_numpy(np.array(batch["fbank"])).float()
        frames = torch.from_numpy(np.array(batch["frames"])).float().permute(0, 1, 4, 2, 3) / 255
        z = encoder(fbank, frames, ("audio", "video")).z
        loss = nn.functional.mse_loss(z["audio"], z["video"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    first = next(WindowReader(index, 0).read(next(windows.windows(epochs[0]))[1], Views(1), 0))
    start_ray()
    torch.set_num_threads(2)
    readers: dict[str, Callable[[], Iterator[Batch]]] = {
        "no reading": lambda: iter(lambda: first, None),
        "Ray tasks (RayReader)": lambda: RayReader(windows, 1, 0.5).stream(epochs),
        "Ray Data set": lambda: ray_data(windows, epochs, 0.5),
    }
    rates = {name: steps_per_s(step, make(), options.steps) for name, make in readers.items()}
    for name, rate in rates.items():
        share = rate / rates["no reading"]
        print(f"{name:<24} {rate * options.batch:>7,.0f} clips/s   {share:.2f} of no reading")


if __name__ == "__main__":
    main()
