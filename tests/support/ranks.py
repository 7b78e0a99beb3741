"""A function on several gloo ranks, which are forked processes.

The forks come from a server that never ran autograd: forking pytest itself fails once any test has
used it, and a fresh interpreter per rank would import torch each time.
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist


def run_ranks(n_ranks: int, fn: Callable[[int, int], Any]) -> list[Any]:
    """Run fn(rank, n_ranks) on n gloo ranks; returns what each rank returned."""
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


def _pickled(fn: Callable[..., Any]) -> bytes:
    """With its module, which other processes may not find."""
    module = sys.modules[getattr(fn, "func", fn).__module__]
    cloudpickle.register_pickle_by_value(module)
    payload = cloudpickle.dumps(fn)
    cloudpickle.unregister_pickle_by_value(module)
    return payload


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
