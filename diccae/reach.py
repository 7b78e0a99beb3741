"""check_reach and check_cache: paths that a node cannot use are refused before anything starts.

Knows nothing of what lies at a path. Invariant: what passes is seen, or made, by every node that
was up when it was asked for; buckets always pass, and so does a cluster of one machine, at no cost.
"""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from diccae.errors import UsageError
from diccae.screen import say
from pipeline.errors import StoreError
from pipeline.storage import Location
from pipeline.store.cached import ShardCache

Q = TypeVar("Q")
A = TypeVar("A")

_END_BYTES = 2**16
_ANSWER_S = 120.0
_MOST_FOLDERS = 1000
"""Opened to find a file: those of classes, however deep, but no link to a folder above for ever."""


class OtherNode(NamedTuple):
    """A node on another machine than the driver's."""

    id: str
    name: str


LooksFrom = Callable[[Sequence[OtherNode], Sequence[str]], list[list[str] | None]]


def check_reach(reads: Mapping[str, str | None], out: str | None = None) -> None:
    """Ask the nodes of the cluster Ray is connected to.

    Args: reads: path or URI by option, of what is only read; out: of `--out`.
    Raises: UsageError naming the option, the path and the node that does not see it.
    """
    given = {**reads, "--out": out}
    local = {
        option: place.path
        for option, uri in given.items()
        if uri is not None and (place := Location(uri)).is_local and os.path.exists(place.path)
    }
    if local and (nodes := other_machines()):
        compare(local, nodes, _looks_from)


def check_cache(store: str, cache: ShardCache | None) -> None:
    """Have each node that may read make its folder of `scale.shard_cache`, without Ray this
    machine; none for a store on a disk, of which nothing is kept. Says of which node the disk is
    smaller than the limit.

    Raises: UsageError naming the node that cannot.
    """
    if cache is None or Location(store).is_local:
        return
    import ray

    if ray.is_initialized():
        # A head that takes no work, as on Kubernetes, reads nothing and has no such disk.
        nodes = [
            OtherNode(node["NodeID"], node["NodeManagerHostname"])
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU")
        ]
        told = [answer for answer in _asked(nodes, _checked, cache) if answer is not None]
    else:
        told = [_checked(cache)]
    for refusal, _ in told:
        if refusal:
            raise UsageError(refusal)
    for _, note in told:
        if note:
            say(f"warning: {note}")


def _checked(cache: ShardCache) -> tuple[str, str]:
    """Why this node cannot keep anything, and what to say if it can; empty if nothing."""
    try:
        return "", cache.check()
    except StoreError as error:
        return str(error), ""


def compare(local: Mapping[str, str], nodes: Sequence[OtherNode], looks_from: LooksFrom) -> None:
    """Compare what every node sees of a file at each path with what is here.

    Args: looks_from: what `look` says on each node, None for one that is gone by now.
    Raises: UsageError.
    """
    with contextlib.ExitStack() as stack:
        shown = [stack.enter_context(_shown(o, Path(path))) for o, path in local.items()]
        here = look(shown)
        for (option, path), mine in zip(local.items(), here, strict=True):
            if not mine:
                raise UsageError(
                    f"{option} {path}: there is no file that this node can read, to ask the other "
                    "nodes of the cluster for. Name a place that has some"
                )
        for node, there in zip(nodes, looks_from(nodes, shown), strict=True):
            seen = here if there is None else there
            for (option, path), mine, theirs in zip(local.items(), here, seen, strict=True):
                if mine != theirs:
                    raise UsageError(
                        f"{option} {path}: node {node.name} of the cluster does not see what this "
                        "node has there. Name a bucket (s3://...), or a disk that all nodes mount "
                        "(on Kubernetes shared_claim, deploy/README.md)"
                    )


@contextlib.contextmanager
def _shown(option: str, path: Path) -> Iterator[str]:
    """A file that is there; in a run folder one that no other folder can have by chance, for as
    long as the block lasts."""
    if option != "--out":
        yield next(_files(path), str(path))
        return
    probe = path / f".seen-{uuid.uuid4().hex}"
    probe.write_text(uuid.uuid4().hex)
    try:
        yield str(probe)
    finally:
        probe.unlink(missing_ok=True)


def _files(path: Path) -> Iterator[str]:
    """Files of a folder that may be read, then those of the folders in it."""
    folders = [str(path)] if path.is_dir() else []
    for folder in folders:  # Grows meanwhile.
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    if os.access(entry.path, os.R_OK):
                        yield entry.path
                elif entry.is_dir() and len(folders) < _MOST_FOLDERS:
                    folders.append(entry.path)


def look(paths: Sequence[str]) -> list[str]:
    """What this node sees of files: length, and digest of both ends; empty if nothing."""
    return [_look(Path(path)) for path in paths]


def _look(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            ends = file.read(_END_BYTES)
            size = file.seek(0, 2)
            file.seek(max(0, size - _END_BYTES))
            ends += file.read(_END_BYTES)
    except OSError:
        return ""
    return f"{size} {hashlib.sha256(ends).hexdigest()}"


def other_machines() -> list[OtherNode]:
    """The nodes up, one of each machine that is not the driver's: nodes of one share its disk."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    up = [node for node in ray.nodes() if node["Alive"]]
    machines = {
        (node["NodeManagerHostname"], node["NodeManagerAddress"]): OtherNode(
            node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        )
        for node in sorted(up, key=lambda node: bool(node["NodeID"] == mine))
    }
    return [node for node in machines.values() if node.id != mine]


def _looks_from(nodes: Sequence[OtherNode], paths: Sequence[str]) -> list[list[str] | None]:
    return _asked(nodes, look, list(paths))


def _asked(nodes: Sequence[OtherNode], question: Callable[[Q], A], of: Q) -> list[A | None]:
    """What a function answers on each node; None from one that is gone."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = ray.remote(num_cpus=0, max_retries=0)(question)
    replies = [
        there.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote(of)
        for node in nodes
    ]
    return [_answer(reply) for reply in replies]


def _answer(reply: Any) -> Any:
    import ray

    try:
        return ray.get(reply, timeout=_ANSWER_S)
    except ray.exceptions.RayError:
        return None  # Taken away since, or not quite there: whoever works on it will say so.
