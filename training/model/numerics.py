"""trunk_numerics: in which precision, and by which attention kernels, a model computes.

Knows nothing of what is computed. Invariant: pretraining and fine-tuning read the same switches;
losses are outside of them and stay in fp32.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.config import PretrainConfig


@contextlib.contextmanager
def trunk_numerics(config: PretrainConfig, device: torch.device) -> Iterator[None]:
    """Autocast and attention kernels of a forward pass; its backward pass follows them."""
    with contextlib.ExitStack() as switches:
        if config.precision == "bf16":
            switches.enter_context(torch.autocast(device.type, torch.bfloat16))
        if not config.sdpa:
            switches.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def convolution_numerics(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Convolutions on a CPU stay in fp32, whatever `pretrain.precision` says; not on a GPU.

    On a CPU with AMX units bf16 convolutions are wrong at times: at stride 2 on a 4x2 map 177 of
    300 calls gave NaN (torch 2.11), none with AMX switched off. Linear layers gave none.
    """
    if device.type == "cpu":
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
