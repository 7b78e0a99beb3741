"""Fixtures of the training core: CAV-MAE's parity data, small encoders."""

import json
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
    """Outputs of the reference CAV-MAE (tests/data/cavmae_parity), float64."""

    pretrained: str
    finetuned: str
    config: EncoderConfig
    shape: InputShape
    expected: dict[str, torch.Tensor]
    fbank_BTM: torch.Tensor
    frames_BFCHW: torch.Tensor


@pytest.fixture(scope="session")
def parity() -> Parity:
    """The tiny CAV-MAE whose outputs were recorded in float64."""
    folder = Path(__file__).parents[1] / "data" / "cavmae_parity"
    sizes = json.loads((folder / "sizes.json").read_text())
    with np.load(folder / "expected.npz") as arrays:
        expected = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return Parity(
        str(folder / "pretrained.pth"),
        str(folder / "finetuned.pth"),
        EncoderConfig(**sizes["encoder"]),
        InputShape(**sizes["shape"]),
        expected,
        expected["audio"].double(),
        expected["images"].double()[:, None],
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
