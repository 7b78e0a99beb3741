"""use_cpu: threads and memory of a process that computes on a CPU.

Knows nothing of what is computed. Invariant: no number depends on where its memory came from; the
number of threads may decide the last bits of a sum.
"""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

# Names and numbers of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1


def use_cpu(n_threads: int) -> None:
    """Compute with `n_threads`, and keep freed memory for the tensors of the next step.

    glibc maps every large tensor anew and gives it back when it is freed, so each step would touch
    its pages for the first time again: up to a tenth of its CPU time (benchmarks/README.md).
    """
    torch.set_num_threads(n_threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # Not glibc: its allocator has its own way.
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """A block that may `use_cpu`, of a process that computes otherwise with its own number."""
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
