"""Which of Ray's log files on this node are of one job, and what is kept of each.

Knows nothing of storage; reads files and writes none. Invariant: what is kept of a file is bounded,
and holds no value of a variable whose name says that it is a secret.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.passwords import without_passwords

HEAD_BYTES, TAIL_BYTES = 64 * 2**10, 960 * 2**10
"""Of each file: how a process began, and what it said last; together 1 MiB."""
MOST_FILES = 256
"""Of a node, the newest: processes that come and go could be any number."""

_WORKER = re.compile(r"worker-(?P<worker>[0-9a-f]+)-(?P<job>[0-9a-f]+)-(?P<pid>\d+)\.(out|err)")
_TRAIN = re.compile(r"ray-train-(?P<of>\w+-\w+)-(?P<worker>[0-9a-f]+)\.log")
_MARKS = (b":job_id:", b":actor_name:", b":task_name:")
"""Lines that Ray's own log monitor reads."""
_BEARER = re.compile(rb"(?i)(bearer\s+)[\w.~+/=-]+")
_SHORTEST_SECRET = 6
"""A shorter value would be masked wherever its letters stand."""


class LogFile(NamedTuple):
    """A log of one process."""

    name: str
    path: Path


def files_of(folder: Path, job: str, but_pid: int = 0) -> list[LogFile]:
    """The files of a job's workers and actors, newest first.

    Args: folder: Ray's logs of this node. job: its number as Ray writes it, 01000000. but_pid: a
        process whose log is left out.
    """
    workers: set[str] = set()
    found: list[LogFile] = []
    for path in folder.glob(f"worker-*-{job}-*"):
        match = _WORKER.fullmatch(path.name)
        if match is None or int(match["pid"]) == but_pid:
            continue
        workers.add(match["worker"])
        name = f"process-{match['pid']}-{match['worker'][:8]}.{match[4]}"
        found.append(LogFile(name, path))
    for path in (folder / "train").glob("ray-train-*.log"):
        match = _TRAIN.fullmatch(path.name)
        if match is not None and match["worker"] in workers:
            found.append(LogFile(f"train-{match['of']}-{match['worker'][:8]}.log", path))
    found.sort(key=lambda file: _modified(file.path), reverse=True)
    return found[:MOST_FILES]


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # Rotated away just now.


def own_log() -> Path | None:
    """The file this process's output goes to, as that of a job's driver does; None without one."""
    try:
        path = Path(os.readlink("/proc/self/fd/1"))
    except OSError:
        return None
    return path if path.is_file() else None


def what_is_kept(path: Path) -> bytes:
    """Head and tail of a file, without Ray's marks; a line says what is left out between."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        text = file.read(HEAD_BYTES + TAIL_BYTES)
        if size > HEAD_BYTES + TAIL_BYTES:
            file.seek(size - TAIL_BYTES)
            head, tail = text[:HEAD_BYTES], file.read(TAIL_BYTES)
            left_out = size - HEAD_BYTES - TAIL_BYTES
            text = head + f"\n... {left_out:,} bytes are left out ...\n".encode() + tail
    return b"".join(line for line in text.splitlines(True) if not line.startswith(_MARKS))


class Masks:
    """Takes secrets out of what is kept."""

    def __init__(self, secrets: Iterable[str]) -> None:
        long_enough = {value for value in secrets if len(value) >= _SHORTEST_SECRET}
        # Longest first: one may be a part of another.
        self._values = [v.encode() for v in sorted(long_enough, key=len, reverse=True)]

    @classmethod
    def of(cls, env: Mapping[str, str], names: "re.Pattern[str]", *more: str) -> "Masks":
        """The values of variables with such names, and more."""
        return cls([*(value for key, value in env.items() if names.search(key)), *more])

    def over(self, text: bytes) -> bytes:
        """The text with *** in their place, in that of a URL's password and of a bearer token."""
        for value in self._values:
            text = text.replace(value, b"***")
        return _BEARER.sub(rb"\1***", without_passwords(text))
