"""Measured: what an evaluation found out about a saved model, kept beside it.

Knows nothing of how it was measured. Invariant: it is of these weights; of others it is not read.

A saved model's folder then holds `measured.json` beside `<name>.safetensors` and `<name>.json`; its
README.md is written anew by `training/weights/beside.py`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.storage import Location
from training.errors import WeightsError

_FILE = "measured.json"
_FORMAT = 2
"""In 1 each stream told classes apart on the clips that it took for one of the two."""


class ToldApart(NamedTuple):
    """How often a stream tells two classes from each other."""

    n_right: int
    """Clips to which it gave the right one of the two a higher probability than the other."""
    n_clips: int
    """Measured clips of the two: the same ones for each stream."""

    @property
    def share(self) -> float:
        """Of the clips, those it was right about."""
        return self.n_right / self.n_clips


class ClassConfusion(NamedTuple):
    """A class, and the one it is most often confused with."""

    name: str
    other: str
    degree: float
    """Mean of both directions' rates, in [0, 1]."""
    n_clips: int
    """Measured clips of the two."""
    told_apart: Mapping[str, ToldApart]
    """By stream; empty where an older version counted, for each stream on clips of its own."""
    decided_by: str | None
    """The modality that tells them apart more often, beyond chance; None where neither does."""


class Measured(NamedTuple):
    """What the evaluation of a run says of its model."""

    sha256: str
    """Of the tensors it was measured on."""
    split: str
    n_clips: int
    store: Mapping[str, Any]
    """uri, version and digest of the feature store."""
    results: Mapping[str, Mapping[str, float]]
    """Metrics by name, then by stream."""
    applied: Mapping[str, Any]
    """`Applied` of the card, as it was measured."""
    confusions: Sequence[ClassConfusion]

    def confusion_of(self, name: str) -> ClassConfusion | None:
        """Of the class of this name; None if it was never confused."""
        return next((each for each in self.confusions if each.name == name), None)


def write_measured(uri: str, measured: Measured) -> None:
    """Keep it in the folder of a saved model."""
    content: dict[str, Any] = {"format": _FORMAT, **measured._asdict()}
    content["confusions"] = [
        each._asdict() | {"told_apart": {s: list(t) for s, t in each.told_apart.items()}}
        for each in measured.confusions
    ]
    Location(uri).write_bytes(_FILE, json.dumps(content, indent=1, ensure_ascii=False).encode())


def read_measured(uri: str, sha256: str) -> Measured | None:
    """What is known of the model whose tensors have this digest; None if nothing is.

    Raises: WeightsError if the file holds something else.
    """
    place = Location(uri)
    if not place.exists(_FILE):
        return None
    try:
        stored = json.loads(place.read_bytes(_FILE))
        # Else of a classifier that was fine-tuned again since.
        return _parsed(stored) if stored["sha256"] == sha256 else None
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{place.uri_of(_FILE)} is not what an evaluation writes "
            f"({type(error).__name__}: {error}): run diccae evaluate again, or remove it"
        ) from error


def _parsed(stored: dict[str, Any]) -> Measured:
    is_counted = stored.pop("format", 1) == _FORMAT
    confusions = []
    for each in stored["confusions"]:
        told = each["told_apart"] if is_counted else {}
        decided_by = each["decided_by"] if is_counted else None
        counted = {stream: ToldApart(*counts) for stream, counts in told.items()}
        same = each | {"told_apart": counted, "decided_by": decided_by}
        confusions.append(ClassConfusion(**same))
    return Measured(**stored | {"confusions": confusions})
