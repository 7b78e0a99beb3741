"""RayPasses: the passes of k-means over Ray actors that hold one share each.

Knows nothing of rounds. Invariant: a call is a function of its arguments and of storage, so Ray may
retry it on a restarted actor; sums are exact, so the reducer changes no bit.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from typing import Any, Literal

import ray
from ray.exceptions import RayTaskError

from clustering.config import ActorGroup, KMeansConfig
from clustering.errors import ClusteringError
from clustering.kmeans.passes import Arguments, Passes, Result, merge
from clustering.kmeans.share import Share, Source, Sums

FOREVER: dict[str, Any] = {
    "max_restarts": -1,
    "max_task_retries": -1,
    "label_selector": {"diccae.io/role": "!train"},
}
"""Options of an actor whose calls may be repeated. A finite number of retries can be used up while
the actor is still restarting. Rendered manifests label the nodes that train: an actor that comes
before the training workers would take CPUs there, and a worker that needs a whole node would wait
for ever. Where nothing is labelled any node will do."""

_TREE_ABOVE = 16
"""Shares whose sums one process adds before it is what everybody waits for."""


class ComputeActor:
    """Passes over one share at a time; a restart only costs reading it again."""

    def __init__(self, block_rows: int, device: Literal["cpu", "cuda"]) -> None:
        self._block_rows, self._device = block_rows, device
        self._token = ""
        self._share: Share | None = None

    def run(
        self, source: Source, method: Callable[[Share, *Arguments], Result], *args: *Arguments
    ) -> Result:
        """A pass over the share of `source`, which is kept for the next one."""
        if self._share is None or self._token != source.token:
            self._share = None  # Before the next one is read: not two at once in memory.
            self._share = Share(source, self._block_rows, self._device)
            self._token = source.token
        return method(self._share, *args)

    def merge(self, *parts: Sums) -> Sums:
        """Partial sums added."""
        return merge(parts)


class RayPasses(Passes):
    """Passes over shares that compute actors hold, one share each."""

    def __init__(
        self, actors: list[Any], sources: Sequence[Source], reducer: str, fan_in: int
    ) -> None:
        """Args: actors: one for each source. reducer, fan_in: as in `PoolConfig`."""
        self._actors = actors
        self._sources = sources
        self._tree = reducer == "tree" or (reducer == "auto" and len(actors) > _TREE_ABOVE)
        self._fan_in = fan_in

    def share_out(self, value: Any) -> Any:
        """One copy per node in the object store."""
        return ray.put(value)

    def gather(
        self, method: Callable[[Share, *Arguments], Result], *args: *Arguments
    ) -> list[Result]:
        """See `Passes.gather`."""
        return unwrapped(lambda: results(self._submit(method, *args)))

    def reduce(self, method: Callable[[Share, *Arguments], Sums], *args: *Arguments) -> Sums:
        """See `Passes.reduce`: added as the parts arrive, or in a tree on the actors."""
        references = self._submit(method, *args)
        while self._tree and len(references) > 1:
            starts = range(0, len(references), self._fan_in)
            references = [
                self._actors[start].merge.remote(*references[start : start + self._fan_in])
                for start in starts
            ]
        arriving = as_completed([reference.future() for reference in references])
        return unwrapped(lambda: merge(future.result() for future in arriving))

    def _submit(
        self, method: Callable[[Share, *Arguments], Result], *args: *Arguments
    ) -> list[Any]:
        return [
            actor.run.remote(source, method, *args)
            for actor, source in zip(self._actors, self._sources, strict=True)
        ]


def results(references: list[Any]) -> list[Any]:
    """Values of references, in their order.

    By futures: the thread of an asyncio actor must not call blocking Ray functions.
    """
    return [future.result() for future in [reference.future() for reference in references]]


def unwrapped(call: Callable[[], Result]) -> Result:
    """Raise an actor's ClusteringError itself, without Ray's envelope."""
    try:
        return call()
    except RayTaskError as error:
        if isinstance(error.cause, ClusteringError):
            raise error.cause from None
        raise


def compute_actors(
    kmeans: KMeansConfig, group: ActorGroup, names: Sequence[str] | None = None
) -> list[Any]:
    """The compute actors of a pool, named if names are given."""
    remote = ray.remote(ComputeActor)
    return [
        remote.options(
            num_cpus=group.cpus, num_gpus=group.gpus, name=names[i] if names else None, **FOREVER
        ).remote(kmeans.block_rows, kmeans.device)
        for i in range(group.n)
    ]


def stop(actors: list[Any]) -> None:
    """End actors for good."""
    for actor in actors:
        ray.kill(actor)
