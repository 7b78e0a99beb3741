"""on_device and HostCopy: to the device and back, while it still computes.

Knows nothing of views or losses. Invariant: the tensors hold the bits of the batch, and copying one
never waits for the device.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.reader import Batch


class DeviceBatch(NamedTuple):
    """One step's clips of this worker."""

    read: Batch
    """As it came from the reader, on the host."""
    fbank_nTM: Tensor
    """float16, as stored."""
    frames_nFHWC: Tensor
    """uint8."""
    labels_nL: Tensor
    """int32, -1 where there is no label, or no further one."""


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[DeviceBatch]:
    """The same batches, in their order; on a GPU copied from pinned memory on their own stream."""
    if device.type != "cuda":
        for batch in batches:
            yield _copied(batch, device)
        return
    copying = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            there = _copied(batch, device)
        computing = torch.cuda.current_stream(device)
        # The device waits for the copy, not the host: it is queued behind the step before.
        computing.wait_stream(copying)
        for x in (there.fbank_nTM, there.frames_nFHWC, there.labels_nL):
            # Without this its memory would be given to the next copy while a step still reads it.
            x.record_stream(computing)
        yield there


def to_device(x: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device; a host that copies from pinned memory need not wait for it."""
    if device.type != "cuda":
        # Arrays out of Ray's object store are read-only, which torch has no tensors for.
        return torch.from_numpy(x if x.flags.writeable else np.array(x))
    # Straight into pinned memory: this thread launches the kernels, too.
    dtype = torch.from_numpy(np.empty(0, x.dtype)).dtype
    host = torch.empty(x.shape, dtype=dtype, pin_memory=True)
    np.copyto(host.numpy(), x)
    return host.to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host, which may do other things until it needs it."""

    def __init__(self, x: Tensor) -> None:
        if x.device.type != "cuda":
            self._host, self._arrived = x.detach().clone(), None
            return
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._host.copy_(x.detach(), non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def wait(self) -> Tensor:
        """The copy; returns when the device has made it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


def _copied(batch: Batch, device: torch.device) -> DeviceBatch:
    host = (batch.fbank, batch.frames, batch.labels)
    fbank, frames, labels = (to_device(x, device) for x in host)
    return DeviceBatch(batch, fbank, frames, labels)
