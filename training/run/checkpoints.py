"""Checkpoints on storage: what is written, the newest one of a run, and where a run branches off.

Knows nothing of who trains. Invariant: what a checkpoint holds loads with weights_only=True.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clustering.rounds.files import is_complete, round_uri
from pipeline.storage import Location
from training.attempt import UNHELD, Attempt
from training.errors import ConfigMismatch, TrainingError

KEPT = 2
"""Checkpoints of a stage that stay, the newest ones, on Ray and in the lab."""
_STATE = "state.pt"
_FORMAT = 3
"""Of checkpoints. 1 had no step of the last update of the confusion matrix, and no settings; 2 no
sample of `train_knn`, and a copy of the whole bank."""


class Span(NamedTuple):
    """The part of a run's steps to take: runs that differ later can share their first epochs."""

    start: str | None = None
    """Checkpoint of another run to go on from, while this one has none of its own."""
    until_epoch: int | None = None
    """Stop after this many epochs, before the round that follows them."""


WHOLE = Span()


def write_state(
    state: dict[str, Any],
    folder: str | Path | Location,
    may_write: Callable[[], None] | None = None,
) -> None:
    """Write a checkpoint, whole or not at all.

    Args: may_write: asked once more before it is at its place: a large one takes a while; raises
        if it must not.
    """
    place = folder if isinstance(folder, Location) else Location(folder)
    with place.written(_STATE) as path:
        torch.save({**state, "format": _FORMAT}, path)
        if may_write is not None:
            may_write()


def state_in(folder: str | Path, numbers_only: bool = False) -> dict[str, Any]:
    """The state a checkpoint holds. Args: numbers_only: tensors have a shape and no values, and
    are not read.

    Raises: ConfigMismatch if another version of diccae wrote it.
    """
    place = Location(folder)
    state: dict[str, Any]
    if numbers_only:
        with place.open(_STATE) as file:
            state = torch.load(file, map_location="meta", weights_only=True)
    else:
        with place.fetched(_STATE) as path:
            state = torch.load(path, map_location="cpu", weights_only=True)
    found = state.get("format", 1)
    if found != _FORMAT:
        raise ConfigMismatch(
            f"{folder}: a checkpoint of format {found}, this diccae reads format {_FORMAT}; go on "
            "with the version that wrote it (run.json: versions), or start again with --fresh"
        )
    return state


def newest_checkpoint(run: Location, name: str) -> tuple[int, str] | None:
    """Step and folder of the newest checkpoint on storage, without starting Ray; None without."""
    place, found = run.below(name), []
    for folder in place.entries():
        if folder.startswith("checkpoint_") and place.exists(f"{folder}/{_STATE}"):
            uri = place.uri_of(folder)
            found.append((int(state_in(uri, numbers_only=True)["step"]), uri))
    return max(found, default=None)


def failure_writer(
    place: Location, rank: int, attempt: Attempt = UNHELD
) -> Callable[[dict[str, Any]], str]:
    """Keeps what is needed to replay a step whose loss was not finite."""

    def write(content: dict[str, Any]) -> str:
        attempt.check()
        name = f"failed/step-{content['step']}-rank-{rank}.pt"
        with place.written(name) as path:
            torch.save(content, path)
        return place.uri_of(name)

    return write


def refuse_lost_labels(state: dict[str, Any], uri: str) -> None:
    """Raises: TrainingError if the labels a checkpoint goes on with are not among the rounds.

    Asked for all the same, they would be waited for until `rounds.timeout_s`, half an hour.
    """
    labelling = state["labelling"]
    number = labelling["round"]
    if labelling["confusion"] and not is_complete(uri, number):
        raise TrainingError(
            f"{round_uri(uri, number)}: the checkpoint of step {state['step']} goes on with the "
            f"labels of round {number}, which are not there any more. Copy the folder back, or "
            "give --fresh to start again"
        )
