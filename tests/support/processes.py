"""Processes that tests look for and kill. Ray's come and go while they are looked at."""

import contextlib
import os

import psutil


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
