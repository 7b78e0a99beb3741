"""Checks of the room a run needs here: shared memory, sockets, disk, a Ray that starts.

Knows nothing of what is installed. Invariant: the embedded Ray is gone when its check returns.
"""

import os
import shutil
import tempfile
from pathlib import Path

from diccae.doctor import child
from diccae.doctor.check import Check, never_raises

_FREE_GB = 5.0
_SHM_MB = 256.0
_SOCKET_PATH = 107  # longest path of a Unix socket
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"


def check_shared_memory() -> Check:
    """Room for Ray's object store in /dev/shm; without it Ray falls back to disk."""
    free_mb = shutil.disk_usage("/dev/shm").free / 2**20 if os.path.isdir("/dev/shm") else 0.0
    ok = free_mb >= _SHM_MB
    hint = "" if ok else "in Docker: --shm-size=2g; in Kubernetes: an emptyDir of medium Memory"
    return Check("shared memory", ok, f"{free_mb:.0f} MB free in /dev/shm", hint)


def check_ray_folder() -> Check:
    """A folder that Ray can put sockets in: writable, and its path short enough."""
    folder = os.environ.get("RAY_TMPDIR") or "/tmp"
    longest = len(folder) + len(_RAY_SOCKET)
    writable = os.access(folder, os.W_OK | os.X_OK)
    ok = writable and longest <= _SOCKET_PATH
    problem = "" if writable else ", not writable"
    if longest > _SOCKET_PATH:
        problem += f", {longest - _SOCKET_PATH} characters too long for a socket"
    hint = "" if ok else "set RAY_TMPDIR to a short folder you may write to, such as /tmp/$USER"
    return Check("ray folder", ok, folder + problem, hint)


_RAY = """
import sys, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         object_store_memory=80 * 2**20, _temp_dir=sys.argv[1])
print(ray.__version__, ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote()))
"""


@never_raises("ray start", "read the log in RAY_TMPDIR; often memory, /dev/shm or a firewall on lo")
def check_ray_start() -> Check:
    """An embedded Ray starts, runs a task and stops, in a child process and a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="ddr", ignore_cleanup_errors=True) as folder:
        # With a token of its own it does not write one to the user's home.
        version, answer = child.run(_RAY, 120, folder, env={"RAY_AUTH_TOKEN": "0" * 64}).split()
    return Check("ray start", answer == "42", f"Ray {version} started, ran a task and stopped")


@never_raises("disk", "free some space")
def check_disk(store: str | None) -> Check:
    """Room where runs, temporary files and a local store are written."""
    places = [os.getcwd(), tempfile.gettempdir()]
    if store and "://" not in store:
        near = Path(store).absolute()
        places.append(str(next(p for p in (near, *near.parents) if p.exists())))
    by_device: dict[int, list[str]] = {}
    for place in dict.fromkeys(places):
        by_device.setdefault(os.stat(place).st_dev, []).append(place)
    found, low = [], []
    for here in by_device.values():
        free = shutil.disk_usage(here[0]).free / 1e9
        found.append(f"{free:.0f} GB free in {', '.join(here)}")
        low += here if free < _FREE_GB else []
    hint = f"make room in {', '.join(low)}: less than {_FREE_GB:.0f} GB is left" if low else ""
    return Check("disk", not low, "; ".join(found), hint)
