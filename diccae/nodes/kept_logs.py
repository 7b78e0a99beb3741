"""KeptLogs: logs of one attempt's processes below its run folder, where they outlive the nodes.

Knows nothing of Ray. Invariant: a file is written whole or not at all, and nothing is written once
the attempt has lost the folder.
"""

import re
from collections.abc import Sequence
from typing import Any

from diccae.errors import UsageError
from diccae.nodes.log_files import LogFile, Masks, what_is_kept
from pipeline.storage import Location
from training.attempt import Attempt

FOLDER = "logs"
DRIVER = "driver.log"


class KeptLogs:
    """Writes what changed of log files to `logs/attempt-N/`."""

    def __init__(self, attempt: Attempt, node: str, masks: Masks) -> None:
        self._attempt, self._node, self._masks = attempt, node, masks
        self._place = Location(attempt.out)
        self._written: dict[str, tuple[int, int]] = {}

    def publish(self, files: Sequence[LogFile]) -> None:
        """Write those that changed since the last call. Raises: RunTaken; OSError and the like."""
        for file in files:
            try:
                found = file.path.stat()
                text = what_is_kept(file.path) if found.st_size else b""
            except FileNotFoundError:
                continue  # A node cleans up after a worker.
            state = (found.st_size, found.st_mtime_ns)
            if not text.strip() or self._written.get(file.name) == state:
                continue
            self._attempt.check()
            about = f"# {self._node}: {file.path.name}\n".encode()
            name = f"{FOLDER}/attempt-{self._attempt.number}/{file.name}"
            self._place.write_bytes(name, about + self._masks.over(text))
            self._written[file.name] = state


def attempts_at(place: Location) -> list[int]:
    """Attempts of a run that left logs, oldest first."""
    try:
        entries: list[dict[str, Any]] = place.fs.ls(place.join(FOLDER), detail=True)
    except FileNotFoundError:
        return []
    found = (re.fullmatch(r"attempt-(\d+)", e["name"].rstrip("/").split("/")[-1]) for e in entries)
    return sorted(int(match[1]) for match in found if match)


def read_kept(out: str, attempt: int | None, of: str) -> tuple[list[str], list[str]]:
    """The logs asked for that a run kept, and the names of all of that attempt.

    Args: attempt: None: the newest. of: a name, or the beginning of one; `all` for every log.
    Raises: UsageError naming what there is.
    """
    place = Location(out)
    attempts = attempts_at(place)
    if not attempts:
        raise UsageError(
            f"{place.uri}: no {FOLDER}/, so nothing was kept: runs keep logs on a cluster they "
            "joined as a job (diccae submit, KubeRay)"
        )
    number = attempts[-1] if attempt is None else attempt
    if number not in attempts:
        told = ", ".join(map(str, attempts))
        raise UsageError(f"{place.uri}: no logs of attempt {number}; there are those of {told}")
    folder = f"{FOLDER}/attempt-{number}"
    names = sorted(entry["name"].split("/")[-1] for entry in place.ls(folder))
    wanted = names if of == "all" else [name for name in names if name.startswith(of)]
    if not wanted:
        told = ", ".join(names)
        raise UsageError(f"{place.uri}: attempt {number} kept no log {of}; it kept {told}")
    texts = [place.read_bytes(f"{folder}/{name}").decode(errors="replace") for name in wanted]
    return texts, names
