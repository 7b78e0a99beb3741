"""A function on several gloo ranks, each a process forked from a server that never ran autograd.

Forking pytest itself fails once any test has used autograd, and a fresh interpreter per rank would
import torch each time.
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

_PRELOADED = ["torch.distributed", "numpy", "training.encoder", "training.losses"]
# The first optimizer of a process imports it, which takes longer than what the ranks compute.
_PRELOADED += ["torch._dynamo"]


def run_ranks(n_ranks: int, fn: Callable[[int, int], Any]) -> list[Any]:
    """Run fn(rank, n_ranks) on n gloo ranks; returns what each rank returned."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    context = multiprocessing.get_context("forkserver")
    module = sys.modules[getattr(fn, "func", fn).__module__]
    cloudpickle.register_pickle_by_value(module)
    payload = cloudpickle.dumps(fn)
    cloudpickle.unregister_pickle_by_value(module)
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


def _rank(payload: bytes, rank: int, n_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", n_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks)
    torch.save(cloudpickle.loads(payload)(rank, n_ranks), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
