"""to_device: the bits of an array, also of one out of an object store, which is read-only."""

import numpy as np
import pytest
import torch

from training.data.device import to_device

KINDS = ("float16", "uint8", "int32")


def read_only(kind: str) -> np.ndarray:
    x = np.random.default_rng(0).integers(0, 100, (6, 5, 4)).astype(kind)[::2]
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_read_only_array_arrives_bit_by_bit(kind: str, device: str) -> None:
    x = read_only(kind)
    there = to_device(x, torch.device(device))
    assert there.device.type == device
    assert there.cpu().numpy().dtype == x.dtype
    assert np.array_equal(there.cpu().numpy(), x)


@pytest.mark.gpu
def test_the_host_may_write_a_batch_while_another_is_on_its_way() -> None:
    """Pinned memory is given to the next array only when its copy has arrived."""
    arrays = [np.full((64, 2**16), i, np.uint8) for i in range(50)]
    there = [to_device(x, torch.device("cuda")) for x in arrays]
    assert [int(x.min()) for x in there] == [int(x.max()) for x in there] == list(range(50))
