"""Fixtures of the training core: CAV-MAE's parity data, small encoders."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from training.config import EncoderConfig
from training.model.encoder import InputShape


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


@pytest.fixture
def attentions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, torch.dtype]]:
    """Whether a fused kernel is chosen, and the dtype, of every attention computed in the test."""
    seen: list[tuple[bool, torch.dtype]] = []
    computed = F.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append((torch._fused_sdp_choice(q, k, v) != SDPBackend.MATH.value, q.dtype))
        return computed(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return seen
