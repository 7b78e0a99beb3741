"""trunk_numerics: in which precision, and by which attention kernels, a model computes.

Knows nothing of what is computed. Invariants: pretraining and fine-tuning read the same switches,
and whoever applies a saved model computes in the same precision; losses are outside of them and
stay in fp32.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.config import PretrainConfig
from training.evaluate_config import Precision


@contextlib.contextmanager
def trunk_numerics(config: PretrainConfig, device: torch.device) -> Iterator[None]:
    """Autocast and attention kernels of a forward pass; its backward pass follows them."""
    with contextlib.ExitStack() as switches:
        switches.enter_context(autocast(config.precision, device))
        if not config.sdpa:
            switches.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Matrix products in this type, softmax and norms in fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def applied_precision(asked: Precision | None, device: torch.device) -> Precision:
    """Of a saved model: as asked, else bf16 on GPUs, where fp32 takes ten times as long, and fp32
    on CPUs, which gain nothing by bf16."""
    return asked or ("bf16" if device.type == "cuda" else "fp32")


def convolution_numerics(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Convolutions on a CPU stay in fp32, whatever `pretrain.precision` says; not on a GPU.

    On a CPU with AMX units bf16 convolutions are wrong at times: at stride 2 on a 4x2 map 177 of
    300 calls gave NaN (torch 2.11), none with AMX switched off. Linear layers gave none.
    """
    if device.type == "cpu":
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
