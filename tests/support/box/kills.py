"""Kills: pods of a running job end in the middle of a write, and how long its work then rests.

Knows nothing of what the job does. Invariant: the file of which a kill says the name is being
written when the pod dies, and that very write comes to nothing.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from support.box.box import Box
from support.box.job import RayCluster
from support.box.pod import Pod

_LOOK_S = 0.5


class Kill(NamedTuple):
    """SIGKILL of one pod."""

    word: str
    """In the name of the object that is being written then."""
    pod: Callable[[RayCluster], Pod]


def head(cluster: RayCluster) -> Pod:
    """The pod of driver, job server and GCS."""
    return cluster.head


def of_group(name: str) -> Callable[[RayCluster], Pod]:
    """The oldest pod of a group: one that no kill has replaced yet, if there is one."""
    return lambda cluster: cluster.of_group(name)[0]


class Kills:
    """A `Watch` that kills one after the other, each once the work goes on after the one before."""

    def __init__(self, box: Box, kills: Sequence[Kill], progress: str) -> None:
        """Args: progress: in the names of objects of which a new one shows that work goes on."""
        self.box, self._progress = box, progress
        self._waiting = list(kills)
        self._seen: set[str] = set()
        self._killed_at: float | None = None
        self._looked_at = 0.0
        self._what = ""
        self.lost_s: dict[str, float] = {}
        """By pod and write, from the kill to the first new object. One that was under way elsewhere
        counts, too: training goes on while a round is made."""
        self._arm()

    def _arm(self) -> None:
        if self._waiting:
            self.box.ask_storage(f"hold?{self._waiting[0].word}")

    def __call__(self, cluster: RayCluster, log: str) -> None:
        """Kill if it is time, or see whether the work goes on."""
        if self._killed_at is not None:
            self._see()
        elif self._waiting and self.box.ask_storage("held") != "0":
            kill = self._waiting.pop(0)
            pod = kill.pod(cluster)
            pod.kill()
            self._killed_at, self._seen = time.monotonic(), self._files()
            self._what = f"{pod.name}, {kill.word}"
            self.box.ask_storage("hold?")

    def _files(self) -> set[str]:
        names = self.box.ask_storage("names?bucket").splitlines()
        return {name for name in names if self._progress in name}

    def _see(self) -> None:
        assert self._killed_at is not None
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        if self._files() - self._seen:
            self.lost_s[self._what] = now - self._killed_at
            print(f"\n{self._what}: {self.lost_s[self._what]:.0f} s lost", flush=True)
            self._killed_at = None
            self._arm()
