"""Kills and Cut: what is done to pods of a running job in the middle of a write.

Knows nothing of what the job does. Invariant: the file of which a kill or cut says the name is
being written when it comes, and that very request comes to nothing.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from support.box.box import Box
from support.box.job import RayCluster
from support.box.pod import Pod

_LOOK_S = 0.5
_CUT_S = 30
"""The least."""


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


def writer(cluster: RayCluster) -> Pod:
    """The pod whose write is held."""
    (address,) = set(cluster.box.ask_storage("held").splitlines())
    (pod,) = [pod for pod in cluster.workers if pod.machine.address == address]
    return pod


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
        elif self._waiting and self.box.ask_storage("held") != "":
            kill = self._waiting.pop(0)
            pod = kill.pod(cluster)
            pod.kill()
            self._killed_at, self._seen = time.monotonic(), self._files()
            self._what = f"{pod.name}, {kill.word}"
            self.box.ask_storage("hold?")

    def _files(self) -> set[str]:
        return _names(self.box, self._progress)

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


class Cut:
    """A `Watch` that pulls a pod's cable, and puts it in again after half a minute or more, once
    others have done what shows that they take it for dead."""

    def __init__(
        self, box: Box, word: str, pod: Callable[[RayCluster], Pod], *, after: str, sign: str
    ) -> None:
        """Args: word, pod: as of a Kill. after: in the name of an object that is there before.
        sign: in the name of a new one, after which the cable is put in again."""
        self.box, self._word, self._pod = box, word, pod
        self._after, self._sign = after, sign
        self._is_armed = False
        self._seen: set[str] = set()
        self._cut_at = 0.0
        self.pod: Pod | None = None
        """Once it was cut."""
        self.cut_s: float | None = None
        """How long, once it is healed."""
        self._n_writes = 0

    def __call__(self, cluster: RayCluster, log: str) -> None:
        """Arm, cut or heal, if it is time."""
        if self.pod is not None:
            self._heal(self.pod)
        elif not self._is_armed and _names(self.box, self._after):
            self.box.ask_storage(f"hold?{self._word}")
            self._is_armed = True
        elif self._is_armed and self.box.ask_storage("held") != "":
            self.pod = self._pod(cluster)
            self._seen = _names(self.box, self._sign)
            self.box.node.cut(self.pod.machine)
            self._cut_at = time.monotonic()
            self.box.ask_storage("hold?")

    def _heal(self, pod: Pod) -> None:
        cut_s = time.monotonic() - self._cut_at
        if self.cut_s is None and cut_s >= _CUT_S and _names(self.box, self._sign) - self._seen:
            self._n_writes = len(self.box.ask_storage("writes").splitlines())
            self.box.node.heal(pod.machine)
            self.cut_s = cut_s
            print(f"\n{pod.name}: {cut_s:.0f} s cut off", flush=True)

    def written_since_by(self, addresses: Collection[str]) -> list[str]:
        """Names that these have written or removed after the cut was healed, in order."""
        writes = [w.split(" ") for w in self.box.ask_storage("writes").splitlines()]
        return [name for address, _, name, _ in writes[self._n_writes :] if address in addresses]


def _names(box: Box, word: str) -> set[str]:
    """Of the objects in the bucket, those with the word."""
    return {name for name in box.ask_storage("names?bucket").splitlines() if word in name}
