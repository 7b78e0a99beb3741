"""Processes that tests look for and kill, and those that ranks are forked from.

Ray's come and go while they are looked at.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator

import psutil
import pytest

# What ranks import, which takes longer than what they compute; the first optimizer of a process
# imports torch._dynamo.
_PRELOADED = ["torch._dynamo", "torch.distributed", "support.trainers", "training.data.reader"]


def below(name: str) -> list[psutil.Process]:
    """Living processes started by this one, at any depth, with `name` in their command line."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill(name: str, at_most: int | None = None) -> int:
    """SIGKILL processes that `below` finds. Returns how many."""
    n_killed = 0
    for process in below(name)[:at_most]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            n_killed += 1
    return n_killed


def ray_env() -> dict[str, str]:
    """The environment of a command that is to join the Ray of this process, as a job does."""
    import ray

    return {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


@contextlib.contextmanager
def shared_server() -> Iterator[None]:
    """One server for ranks and for ablations, which name less: the first to start it decides."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "set_forkserver_preload", lambda names: None)
        yield
