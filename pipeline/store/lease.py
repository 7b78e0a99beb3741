"""Lease: the right to be the one writer of a store or a run folder, with a heartbeat.

Knows nothing of what is written. Invariant: of any number of processes at most one holds the newest
generation, because a generation is a file that only one of them can create; a holder that lost it
notices before its next commit.

Commits are safe without it (each builds on the version its writer has seen); the lease saves the
work that two runs would do twice, and tells the second user so. The next attempt of a job that died
is no second user: what it finds is its own lease, and a refusal would use up one of the job's few
retries. It waits while heartbeats come, and takes over once two are missing: its job's controller
has given the earlier attempt up, and if that lives after all, it finds the newer generation. Who
asks to waits too, for what takes moments.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import StoreLocked
from pipeline.storage import Location, storage_failures_ignored

logger = logging.getLogger(__name__)

JOB = "DICCAE_JOB"
"""Variable that the attempts of one job share, and no other start has."""
_BEATS, _MISSED = 6, 2
"""Heartbeats in `stale_s`; of them missing when the next attempt of the same job takes over."""
_LOOK_AGAIN_S = 1.0
"""Who waits looks as often, or more often where leases are shorter."""
LEASE_FOLDER = "lease"
"""Below the place that is held."""
_LOST = "this run was taken for dead and lost its lease. {}"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_ended: set[str] = set()
"""Owners of leases that this process has given up."""


class Lease:
    """Context manager; `check` before each commit."""

    def __init__(
        self, location: Location, stale_s: float, purpose: str, *, waits: bool = False
    ) -> None:
        """Args: stale_s: silence after which a holder is taken for dead; purpose: for messages;
        waits: for any holder, instead of being refused."""
        self._location = location
        self._waits = waits
        self._stale_s = stale_s
        self._me: dict[str, Any] = {
            "owner": uuid.uuid4().hex,
            "host": _host(),
            "pid": os.getpid(),
            "pid_started": psutil.Process().create_time(),
            "purpose": purpose,
            "since": time.time(),
            # Others judge the silence by it: who beats slowly is not dead to a hasty one.
            "stale_s": stale_s,
            "job": os.environ.get(JOB, ""),
        }
        self._generation = 0
        self._stop = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def generation(self) -> int:
        """Number of this hold among all of the place; 0 before it is entered."""
        return self._generation

    def __enter__(self) -> "Lease":
        """Waits for an earlier attempt of our job, or for anybody if told to.

        Raises: StoreLocked if somebody else writes.
        """
        has_told = False
        while (holder := self._take()) is not None:
            said = _describe(self._location, holder, self._stale_s)
            is_ours = self._is_of_our_job(holder)
            if not (is_ours or self._waits):
                raise StoreLocked(said)
            if not has_told:
                who = "It is an earlier attempt of this job: waiting" if is_ours else "Waiting"
                logger.warning("%s %s for it.", said, who)
            has_told = True
            time.sleep(min(self._stale_s / _BEATS, _LOOK_AGAIN_S))
        self._thread.start()
        return self

    def _take(self) -> dict[str, Any] | None:
        """Create the next generation. Returns: who holds the place instead; None if we do."""
        newest = self._newest()
        holder = self._read(newest)
        if holder is not None and self._is_alive(newest, holder):
            return holder
        self._generation = newest + 1
        if not self._location.create_bytes(_name(self._generation), self._stamp()):
            return self._read(self._generation) or {}
        for generation in range(max(1, newest - 1), newest + 1):
            self._location.remove(_name(generation))
        return None

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
            self._lost = _describe(self._location, self._read(self._newest()), self._stale_s)
        if self._lost is not None:
            raise StoreLocked(_LOST.format(self._lost))

    def _is_of_our_job(self, holder: dict[str, Any]) -> bool:
        return bool(self._me["job"]) and holder.get("job") == self._me["job"]

    def _beat(self) -> None:
        while not self._stop.wait(self._stale_s / _BEATS):
            # Storage that is away for a while costs a heartbeat, not the run.
            with storage_failures_ignored():
                if self._newest() != self._generation:
                    holder = self._read(self._newest())
                    self._lost = _describe(self._location, holder, self._stale_s)
                    return
                self._location.write_bytes(_name(self._generation), self._stamp())

    def _stamp(self, released: bool = False) -> bytes:
        return json.dumps(self._me | {"beat": time.time(), "released": released}).encode()

    def _newest(self) -> int:
        return _newest_at(self._location)

    def _read(self, generation: int) -> dict[str, Any] | None:
        return _read_at(self._location, generation)

    def _is_alive(self, generation: int, holder: dict[str, Any]) -> bool:
        if holder["released"] or holder["owner"] in _ended:
            return False
        if holder["host"] == self._me["host"]:
            status = _status_of(holder["pid"], holder["pid_started"])
            # A stopped process (SIGSTOP, Ctrl-Z) is judged by its silence: it may never go on.
            if status != psutil.STATUS_STOPPED:
                return status is not None
        stale_s, silent_s = _stale_s_of(holder, self._stale_s), time.time() - holder["beat"]
        if self._is_of_our_job(holder):
            return bool(silent_s < stale_s * _MISSED / _BEATS)
        if silent_s < stale_s:
            return True
        # Clocks differ between machines: a heartbeat that looks old may still go on.
        time.sleep(stale_s / 3)
        again = self._read(generation)
        return again is None or again["beat"] != holder["beat"]


def check_generation(uri: str, generation: int) -> None:
    """`Lease.check` for processes, also on other machines, that work for the holder of a lease.

    Raises: StoreLocked if a younger generation holds the place.
    """
    location = Location(uri)
    newest = _newest_at(location)
    if newest != generation:
        raise StoreLocked(_LOST.format(_describe(location, _read_at(location, newest))))


def _newest_at(location: Location) -> int:
    names = location.files(LEASE_FOLDER)
    numbers = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _read_at(location: Location, generation: int) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = json.loads(location.read_bytes(_name(generation)))
        return holder
    except FileNotFoundError:
        return None


def _stale_s_of(holder: dict[str, Any], otherwise: float) -> float:
    """Leases of older versions do not say it."""
    return float(holder.get("stale_s", otherwise))


def _describe(location: Location, about: dict[str, Any] | None, stale_s: float = 0.0) -> str:
    holder = about or {}
    ago = f"{time.time() - holder['beat']:.0f} s ago" if "beat" in holder else "just now"
    since = ""
    if "since" in holder:
        began = datetime.fromtimestamp(holder["since"], UTC)
        since = f", since {began.isoformat(timespec='seconds')}"
    return (
        f"{location.uri}: locked by {holder.get('purpose', 'another run')} "
        f"(host {holder.get('host', '?')}, process {holder.get('pid', '?')}{since}, heartbeat "
        f"{ago}). Wait for it or end it: silent for {_stale_s_of(holder, stale_s):.0f} s, it "
        "counts as dead."
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
    return f"{LEASE_FOLDER}/{generation:08d}.json"


def _status_of(pid: int, started: float) -> str | None:
    """psutil's word for how the very process fares; None if it is gone."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 1.0
        status = str(process.status())
    except psutil.Error:
        return None
    return status if same and status != psutil.STATUS_ZOMBIE else None
