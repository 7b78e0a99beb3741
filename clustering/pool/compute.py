"""The passes of k-means over compute actors, one share each.

Knows nothing of rounds. Invariant: a call is a function of its arguments and of storage, so Ray may
retry it on a restarted actor; sums are exact, so the reducer changes no bit.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from typing import Any, Literal

import ray
from ray.exceptions import RayTaskError

from clustering.config import ClusteringConfig
from clustering.errors import ClusteringError
from clustering.kmeans.passes import Passes, Sums, merge
from clustering.kmeans.share import Share, Source

FOREVER: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
"""Options of an actor whose calls may be repeated. A finite number of retries can be used up while
the actor is still restarting."""

_TREE_ABOVE = 16


class ComputeActor:
    """Passes over one share at a time; a restart only costs reading it again."""

    def __init__(self, block_rows: int, device: Literal["cpu", "cuda"]) -> None:
        self._block_rows, self._device = block_rows, device
        self._token = ""
        self._share: Share | None = None

    def run(self, source: Source, method: str, *args: Any) -> Any:
        """Call a method of `Share` on the share of `source`."""
        if self._share is None or self._token != source.token:
            self._share = None
            self._share = Share(source, self._block_rows, self._device)
            self._token = source.token
        return getattr(self._share, method)(*args)

    def merge(self, *parts: Sums) -> Sums:
        """Partial sums added."""
        return merge(list(parts))


class RayPasses(Passes):
    """Passes over shares that compute actors hold, one share each."""

    def __init__(
        self, actors: list[Any], sources: Sequence[Source], reducer: str = "auto", fan_in: int = 8
    ) -> None:
        self._actors = actors
        self._sources = sources
        self._tree = reducer == "tree" or (reducer == "auto" and len(actors) > _TREE_ABOVE)
        self._fan_in = fan_in

    def share_out(self, value: Any) -> Any:
        """One copy per node in the object store."""
        return ray.put(value)

    def gather(self, method: str, *args: Any) -> list[Any]:
        """See `Passes.gather`."""
        return unwrapped(lambda: results(self._submit(method, args)))

    def reduce(self, method: str, *args: Any) -> Sums:
        """See `Passes.reduce`: folded as the parts arrive, or in a tree on the actors."""
        references = self._submit(method, args)
        while self._tree and len(references) > 1:
            starts = range(0, len(references), self._fan_in)
            references = [
                self._actors[start].merge.remote(*references[start : start + self._fan_in])
                for start in starts
            ]
        return unwrapped(lambda: _fold(references))

    def _submit(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        return [
            actor.run.remote(source, method, *args)
            for actor, source in zip(self._actors, self._sources, strict=True)
        ]


def _fold(references: list[Any]) -> Sums:
    # Futures, not ray.wait: a thread of an asyncio actor must not call blocking Ray functions.
    arriving = as_completed([reference.future() for reference in references])
    total: Sums = tuple(array.copy() for array in next(arriving).result())
    for part in arriving:
        for array, addend in zip(total, part.result(), strict=True):
            array += addend
    return total


def results(references: list[Any]) -> list[Any]:
    """Values of references, in their order; usable from a thread of an asyncio actor."""
    return [future.result() for future in [reference.future() for reference in references]]


def unwrapped(call: Callable[[], Any]) -> Any:
    """Raise an actor's ClusteringError itself, without Ray's envelope."""
    try:
        return call()
    except RayTaskError as error:
        if isinstance(error.cause, ClusteringError):
            raise error.cause from None
        raise


def compute_actors(
    config: ClusteringConfig, count: int, names: list[str] | None = None
) -> list[Any]:
    """Compute actors that restart and retry for ever, named if names are given."""
    options = {
        "num_cpus": config.cpus_per_actor,
        "num_gpus": config.gpus_per_actor,
        **FOREVER,
    }
    remote = ray.remote(ComputeActor)
    return [
        remote.options(**options, **({"name": names[i]} if names else {})).remote(
            config.block_rows, config.device
        )
        for i in range(count)
    ]


def stop(actors: list[Any]) -> None:
    """End actors for good."""
    for actor in actors:
        ray.kill(actor)
