"""Lease: the right to be the one writer of a store, with a heartbeat.

Knows nothing of what is written. Invariant: of any number of processes at most one holds the newest
generation, because a generation is a file that only one of them can create; a holder that lost it
notices before its next commit.

Commits are safe without it (each builds on the version its writer has seen); the lease saves the
work that two runs would do twice, and tells the second user so.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import StoreLocked
from pipeline.storage import Location, storage_failures_ignored

_FOLDER = "lease"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_ended: set[str] = set()
"""Owners of leases that this process has given up."""


class Lease:
    """Context manager; `check` before each commit."""

    def __init__(self, location: Location, stale_s: float, purpose: str) -> None:
        """Args: stale_s: silence after which a holder is taken for dead; purpose: for messages."""
        self._location = location
        self._stale_s = stale_s
        self._me: dict[str, Any] = {
            "owner": uuid.uuid4().hex,
            "host": _host(),
            "pid": os.getpid(),
            "pid_started": psutil.Process().create_time(),
            "purpose": purpose,
            # Others judge the silence by it: who beats slowly is not dead to a hasty one.
            "stale_s": stale_s,
        }
        self._generation = 0
        self._stop = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Raises: StoreLocked if somebody else is writing."""
        newest = self._newest()
        holder = self._read(newest)
        if holder is not None and self._is_alive(newest, holder):
            raise StoreLocked(self._describe(holder))
        self._generation = newest + 1
        if not self._location.create_bytes(_name(self._generation), self._stamp()):
            raise StoreLocked(self._describe(self._read(self._generation) or {}))
        for generation in range(max(1, newest - 1), newest + 1):
            self._location.remove(_name(generation))
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        # Where storage is full or away the file stays as it is, and the end of this process
        # releases it.
        with storage_failures_ignored():
            if self._lost is None and self._newest() == self._generation:
                _ended.add(self._me["owner"])
                # The file stays, released: the next generation must be a higher one.
                self._location.write_bytes(_name(self._generation), self._stamp(released=True))

    def check(self) -> None:
        """Raises: StoreLocked if another process has taken the lease over."""
        if self._lost is None and self._newest() != self._generation:
            self._lost = self._describe(self._read(self._newest()) or {})
        if self._lost is not None:
            raise StoreLocked(f"this run was taken for dead and lost its lease. {self._lost}")

    def _beat(self) -> None:
        while not self._stop.wait(self._stale_s / 6):
            # Storage that is away for a while costs a heartbeat, not the run.
            with storage_failures_ignored():
                if self._newest() != self._generation:
                    self._lost = self._describe(self._read(self._newest()) or {})
                    return
                self._location.write_bytes(_name(self._generation), self._stamp())

    def _stamp(self, released: bool = False) -> bytes:
        return json.dumps(self._me | {"beat": time.time(), "released": released}).encode()

    def _newest(self) -> int:
        names = (entry["name"].rsplit("/", 1)[-1] for entry in self._location.ls(_FOLDER))
        numbers = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return max((int(number) for number in numbers if number.isdigit()), default=0)

    def _read(self, generation: int) -> dict[str, Any] | None:
        try:
            holder: dict[str, Any] = json.loads(self._location.read_bytes(_name(generation)))
            return holder
        except FileNotFoundError:
            return None

    def _is_alive(self, generation: int, holder: dict[str, Any]) -> bool:
        if holder["released"] or holder["owner"] in _ended:
            return False
        if holder["host"] == self._me["host"]:
            return _same_process(holder["pid"], holder["pid_started"])
        stale_s = self._stale_s_of(holder)
        if time.time() - holder["beat"] < stale_s:
            return True
        # Clocks differ between machines: a heartbeat that looks old may still go on.
        time.sleep(stale_s / 3)
        again = self._read(generation)
        return again is None or again["beat"] != holder["beat"]

    def _stale_s_of(self, holder: dict[str, Any]) -> float:
        """Leases of older versions do not say it."""
        return float(holder.get("stale_s", self._stale_s))

    def _describe(self, holder: dict[str, Any]) -> str:
        ago = f"{time.time() - holder['beat']:.0f} s ago" if "beat" in holder else "just now"
        return (
            f"{self._location.uri}: locked by {holder.get('purpose', 'another run')} "
            f"(host {holder.get('host', '?')}, process {holder.get('pid', '?')}, heartbeat {ago}). "
            f"Wait for it or end it: silent for "
            f"{self._stale_s_of(holder):.0f} s, it counts as dead."
        )


def _host() -> str:
    """This machine since it started, or this container: where a process id means one process.

    Machines made from one image share their name and the number of their first namespace.
    """
    with contextlib.suppress(OSError):
        boot = Path(_BOOT_ID).read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _name(generation: int) -> str:
    return f"{_FOLDER}/{generation:08d}.json"


def _same_process(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
