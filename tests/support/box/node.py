"""Node: a machine of its own inside this one, on which pods and servers are real processes.

Knows nothing of Kubernetes. Everything is made in unnamed namespaces that live as long as one
process: with it go all processes, disks, addresses and rules, however the tests end.
Invariant: nothing of the host's network, mounts or processes is changed.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import psutil
from support.box.errors import BoxError

_PREFIX = "dbox-"
_NETWORK = "10.244"
_PR_SET_PDEATHSIG = 1
_CGROUPS = Path("/sys/fs/cgroup/memory")
_TOOLS = ("ip", "unshare", "nsenter", "setpriv", "nft", "wget")
_ENTER = ("--mount", "--net", "--pid", "--ipc", "--uts")


def why_not() -> str | None:
    """Why no box can be made here; None if one can."""
    if os.geteuid() != 0:
        return "pods in a box need root (namespaces, mounts, addresses)"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"pods in a box need {', '.join(missing)} (Debian: iproute2 util-linux nftables)"
    trial = "mount -t tmpfs t /mnt && ip link add br0 type bridge && nft add table inet t"
    command = ["unshare", "-m", "-n", "-p", "-f", "sh", "-c", trial]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"namespaces are denied here: {done.stderr.strip()}" if done.returncode else None


def _dies_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Machine(NamedTuple):
    """A place on the node's network."""

    name: str
    address: str
    cable: str
    """The node's end of its network."""


class Node:
    """One at a time makes sense: a box of Ray nodes needs gigabytes."""

    def __init__(self) -> None:
        _remove_stale()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir="/tmp"))
        self._last_address = 1
        self._cgroups: list[Path] = []
        self._holder = subprocess.Popen(
            ["unshare", *_ENTER, "--fork", "--kill-child", "--mount-proc", "sleep", "infinity"],
            preexec_fn=_dies_with_us,
        )
        self._pid = below(self._holder, 1)
        self.sh(
            "mount -t tmpfs run /run && mkdir /run/netns /run/cgroup && ip link set lo up"
            " && mount --rbind /sys/fs/cgroup /run/cgroup"
            " && ip link add br0 type bridge && ip link set br0 up"
        )

    def close(self) -> None:
        """Kill all that runs on the node; no trace is left."""
        # The init of its process namespace: the kernel kills the rest before that one is gone.
        self._holder.kill()
        self._holder.wait()
        for cgroup in self._cgroups:
            _remove_cgroup(cgroup)
        shutil.rmtree(self.folder, ignore_errors=True)

    def prefix(self, machine: str | None = None) -> list[str]:
        """Words before a command that is to run on the node, or on one of its machines."""
        enter = ["nsenter", "--target", str(self._pid), *_ENTER]
        return enter if machine is None else [*enter, "ip", "netns", "exec", machine]

    def sh(self, script: str, machine: str | None = None, stdin: str | None = None) -> str:
        """Run a few shell words there and return what they print. Raises: BoxError."""
        command = [*self.prefix(machine), "sh", "-ec", script]
        done = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=60)
        if done.returncode:
            raise BoxError(f"{machine or 'node'}: {script}: {done.stderr.strip()}")
        return done.stdout

    def start(
        self,
        command: Sequence[str],
        machine: str | None,
        log: IO[bytes] | int,
        env: Mapping[str, str] | None = None,
        cgroup: Path | None = None,
    ) -> "subprocess.Popen[bytes]":
        """A process there, with the host's files, in a group of `limit_memory` from its start."""

        def prepare() -> None:
            _dies_with_us()
            if cgroup is not None:
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))

        return subprocess.Popen(
            [*self.prefix(machine), *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            preexec_fn=prepare,
        )

    def limit_memory(self, name: str, limit: int) -> Path | None:
        """A control group of at most `limit` bytes; None where the kernel has no such groups."""
        if not (_CGROUPS / "memory.limit_in_bytes").exists():
            return None
        cgroup = _CGROUPS / f"{self.folder.name}-{name}"
        cgroup.mkdir()
        (cgroup / "memory.limit_in_bytes").write_text(str(limit))
        self._cgroups.append(cgroup)
        return cgroup

    def remove_cgroup(self, cgroup: Path | None) -> None:
        """Once its processes have ended."""
        if cgroup is not None:
            self._cgroups.remove(cgroup)
            _remove_cgroup(cgroup)

    def add_machine(self, name: str) -> Machine:
        """A network namespace with an address of its own, on the node's bridge."""
        self._last_address += 1
        number = self._last_address
        address, cable = f"{_NETWORK}.{number // 250}.{number % 250 + 1}", f"v{number}"
        machine = Machine(name, address, cable)
        self.sh(
            f"ip netns add {name}"
            f" && ip link add {cable} type veth peer name eth0 netns {name}"
            f" && ip link set {cable} master br0 up"
        )
        self.sh(
            f"ip link set lo up && ip addr add {machine.address}/16 dev eth0"
            " && ip link set eth0 up",
            name,
        )
        return machine

    def cut(self, machine: Machine) -> None:
        """Pull the cable: no packet in or out, and no word to either side."""
        self.sh(f"ip link set {machine.cable} down")

    def heal(self, machine: Machine) -> None:
        """Put it in again."""
        self.sh(f"ip link set {machine.cable} up")

    def remove_machine(self, machine: Machine) -> None:
        """Take the place away; its processes must have ended."""
        self.sh(f"ip link del {machine.cable}; ip netns del {machine.name}")


def below(started: "subprocess.Popen[bytes]", depth: int, timeout_s: float = 60.0) -> int:
    """The host's id of the process `depth` forks below the one that was started.

    Raises: BoxError if it never came to be.
    """
    deadline = time.monotonic() + timeout_s
    while started.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(started.pid)
            for _ in range(depth):
                (process,) = process.children()[:1] or (None,)
                if process is None:
                    break
            else:
                return process.pid
        time.sleep(0.005)
    raise BoxError(f"{started.args}: ended before it began")


def _remove_stale() -> None:
    """Folders and groups of test processes that were killed; all else went with them."""
    for parent, remove in ((Path("/tmp"), shutil.rmtree), (_CGROUPS, _remove_cgroup)):
        for folder in parent.glob(f"{_PREFIX}*"):
            if not psutil.pid_exists(int(folder.name.split("-")[1])):
                remove(folder)


def _remove_cgroup(cgroup: Path) -> None:
    """Once its last process has been reaped, which the kernel does a little after the kill."""
    deadline = time.monotonic() + 10
    while cgroup.exists() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            cgroup.rmdir()
            return
        time.sleep(0.02)
