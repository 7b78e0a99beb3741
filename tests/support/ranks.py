"""A function on several gloo ranks: forked processes, or tasks of the session's Ray.

The forks come from a server that never ran autograd: forking pytest itself fails once any test has
used it, and a fresh interpreter per rank would import torch each time.
"""

import contextlib
import functools
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

_PRELOADED = ["torch.distributed", "numpy", "training.model.encoder", "training.losses.terms"]
# The first optimizer of a process imports it, which takes longer than what the ranks compute.
_PRELOADED += ["torch._dynamo"]


def run_ranks(n_ranks: int, fn: Callable[[int, int], Any]) -> list[Any]:
    """Run fn(rank, n_ranks) on n gloo ranks; returns what each rank returned."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    context = multiprocessing.get_context("forkserver")
    payload = _pickled(fn)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(payload, rank, n_ranks, folder))
            for rank in range(n_ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(400)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        assert codes == [0] * n_ranks, f"ranks ended with {codes}"
        return [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(n_ranks)]


def run_ray_ranks(n_ranks: int, fn: Callable[[int, int], Any]) -> list[Any]:
    """The same in Ray's worker processes, without Ray Train."""
    import ray

    # A lambda travels by value: Ray's workers do not find the modules of tests.
    task = ray.remote(num_cpus=0.3)(lambda pickled: cloudpickle.loads(pickled)())
    payload = _pickled(fn)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [functools.partial(_called, payload, r, n_ranks, folder) for r in range(n_ranks)]
        return ray.get([task.remote(_pickled(rank)) for rank in ranks])


@contextlib.contextmanager
def by_value(module_name: str) -> Iterator[None]:
    """Send functions of a test module with their code: other processes may not find the module."""
    module = sys.modules[module_name]
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _pickled(fn: Callable[..., Any]) -> bytes:
    with by_value(getattr(fn, "func", fn).__module__):
        return bytes(cloudpickle.dumps(fn))


def _rank(payload: bytes, rank: int, n_ranks: int, folder: str) -> None:
    torch.save(_called(payload, rank, n_ranks, folder), f"{folder}/{rank}.pt")


def _called(payload: bytes, rank: int, n_ranks: int, folder: str) -> Any:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", n_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks)
    try:
        return cloudpickle.loads(payload)(rank, n_ranks)
    finally:
        dist.destroy_process_group()
