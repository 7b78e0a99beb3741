"""Fixtures of the training core: CAV-MAE's parity data, small encoders, groups of gloo ranks."""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from training.config import EncoderConfig
from training.encoder import InputShape


class Parity(NamedTuple):
    folder: Path
    config: EncoderConfig
    shape: InputShape
    expected: dict[str, torch.Tensor]
    fbank_BTM: torch.Tensor
    frames_BFCHW: torch.Tensor


@pytest.fixture(scope="session")
def parity() -> Parity:
    """The tiny CAV-MAE whose outputs were recorded in float64."""
    beside = Path(__file__).parents[3] / "shared" / "data" / "cavmae-parity"
    folder = Path(os.environ.get("DICCAE_PARITY_DIR", beside))
    if not (folder / "expected_tiny.npz").exists():
        pytest.skip(f"no CAV-MAE parity data in {folder}; set DICCAE_PARITY_DIR")
    sizes = json.loads((folder / "config_tiny.json").read_text())
    config = EncoderConfig(
        preset="base",
        dim=sizes["enc"]["embed_dim"],
        n_heads=sizes["enc"]["num_heads"],
        depth=sizes["enc"]["modality_specific_depth"],
        decoder_dim=sizes["dec"]["decoder_embed_dim"],
        decoder_depth=sizes["dec"]["decoder_depth"],
        decoder_heads=sizes["dec"]["decoder_num_heads"],
    )
    with np.load(folder / "expected_tiny.npz") as arrays:
        expected = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return Parity(
        folder,
        config,
        InputShape(sizes["enc"]["audio_length"], 128, sizes["enc"]["img_size"]),
        expected,
        expected["audio"].double(),
        expected["img"].double()[:, None],
    )


def _rank(
    fn: Callable[[int, int], Any], rank: int, n_ranks: int, folder: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    store = dist.FileStore(f"{folder}/store", n_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks)
    torch.save(fn(rank, n_ranks), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture
def run_ranks() -> Callable[[int, Callable[[int, int], Any]], list[Any]]:
    """Run fn(rank, n_ranks) on n gloo ranks by fork; returns what each rank returned."""

    def run(n_ranks: int, fn: Callable[[int, int], Any]) -> list[Any]:
        context = multiprocessing.get_context("fork")
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                context.Process(target=_rank, args=(fn, rank, n_ranks, folder, 1))
                for rank in range(n_ranks)
            ]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(200)
            codes = [process.exitcode for process in ranks]
            for process in ranks:
                process.kill()
            assert codes == [0] * n_ranks, f"ranks ended with {codes}"
            return [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in range(n_ranks)]

    return run
