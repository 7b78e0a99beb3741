"""usable_cores: how many cores this process may keep busy.

Knows nothing of what runs on them. Invariant: never more than the machine has, never less than one.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_OWN = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores that this process may run on (`taskset`, Slurm, cpusets), or as many as the quota
    of its control group has time for (`docker --cpus`, a pod's limit) if those are fewer. A piece
    of a core counts as one.
    """
    return min([len(os.sched_getaffinity(0)), *map(math.ceil, _quotas())])


def _quotas() -> Iterator[float]:
    """Cores' time that the group of this process and those above it may take, where limited."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return  # No control groups here.
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 names no controllers; of version 1 each set is mounted by its name.
        place = _MOUNTED / controllers
        group = PurePosixPath(path.lstrip("/"))
        # A container without a namespace of groups is told its path on the machine, and finds its
        # own group mounted at the top.
        for one in (group, *group.parents):
            if quota := _quota(place / one):
                yield quota


def _quota(group: Path) -> float | None:
    """Cores' time of one group, by the files of version 2 or of version 1; None: no limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return None if int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return None  # There are no such files, or the quota is "max".
