"""ReportData: what a run folder holds for its report, each part of it or None.

Knows nothing of how a page looks. A run may lack parts (no fine-tuning, no clustering): that is no
error; a part that is there but cannot be read is.
Invariant: reads only.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clustering.rounds.files import is_complete, load_round, round_uri, rounds_at
from clustering.rounds.protocol import PublishedRound
from pipeline.storage import Location
from training.errors import TrainingError
from training.evaluation.predictions import models_predicted, retrained_since
from training.evaluation.results import (
    ConfusionCounts,
    UnitVectors,
    read_confusion,
    read_embeddings,
)
from training.report.curves import Columns, columns_of
from training.tracking.tracker import FINETUNE_METRICS, METRICS, read_metrics

T = TypeVar("T")


class Artifact(NamedTuple):
    """A file that the run produced."""

    name: str
    size: int
    sha256: str


class ReportData(NamedTuple):
    """All a report needs of a run."""

    place: Location
    run: dict[str, Any]
    results: dict[str, Any]
    config_yaml: str
    metrics: Columns
    """Of pretraining."""
    finetuning: Columns
    """Of fine-tuning, which counts its own steps; names without `finetune/`."""
    rounds: list[PublishedRound]
    """With the labels of their first head alone: thirty whole ones of VGGSound are 0.5 GB."""
    confusion: ConfusionCounts | None
    predictions: pa.Table | None
    embeddings: UnitVectors | None
    artifacts: list[Artifact]
    retrained: list[str]
    """Models that are others by now than those evaluated, or came since."""


def read_run(folder: str | Path) -> ReportData:
    """Read what a run left behind.

    Raises: TrainingError if it is no run folder, or a part of it is broken.
    """
    place = Location(folder)
    if not place.exists("run.json") and not place.exists("results.json"):
        raise TrainingError(
            f"{place.uri}: no run folder (neither run.json nor results.json is in it); "
            "give the --out of a pretrain, finetune or demo run"
        )
    predictions = _read(place, "evaluation/predictions.parquet", _without_probabilities)
    return ReportData(
        place=place,
        run=_json(place, "run.json"),
        results=_json(place, "results.json"),
        config_yaml=_read(place, "config.yaml", Path.read_text) or "",
        metrics=_columns(place, METRICS),
        finetuning=_columns(place, FINETUNE_METRICS, "finetune/"),
        rounds=_rounds(place.below("rounds")),
        confusion=_read(place, "evaluation/confusion.npz", read_confusion),
        predictions=predictions,
        embeddings=_read(place, "evaluation/embeddings.npz", _sound_and_picture),
        artifacts=_artifacts(place),
        retrained=_retrained(place, predictions),
    )


def _retrained(place: Location, predictions: pa.Table | None) -> list[str]:
    if predictions is None:
        return []
    return retrained_since(place, models_predicted(predictions.schema))


def _read(place: Location, name: str, read: Callable[[Path], T]) -> T | None:
    try:
        with place.fetched(name) as file, _broken(place.uri_of(name)):
            return read(file)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _broken(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, BadZipFile, pa.ArrowException) as error:
        raise TrainingError(
            f"{name}: cannot be read ({error}); run the evaluation again, or remove the file to "
            "leave its part out of the report"
        ) from error


def _without_probabilities(file: Path) -> pa.Table:
    """What was taken for what; 57 MB of VGGSound's file are probabilities."""
    names = pq.read_schema(file).names
    return pq.read_table(file, columns=[n for n in names if not n.startswith("probabilities_")])


def _sound_and_picture(file: Path) -> UnitVectors:
    """Without the vectors of fusion, for which no example is looked up: 50 MB of VGGSound's."""
    ids, vectors = read_embeddings(file)
    return UnitVectors(ids, {s: vectors[s] for s in ("audio", "video") if s in vectors})


def _columns(place: Location, name: str, prefix: str = "") -> Columns:
    return _read(place, name, lambda file: columns_of(read_metrics(file), prefix)) or {}


def _json(place: Location, name: str) -> dict[str, Any]:
    return _read(place, name, lambda file: json.loads(file.read_text())) or {}


def _rounds(place: Location) -> list[PublishedRound]:
    """Completed rounds, published or withheld, in order."""
    found = []
    for number in rounds_at(place.uri):
        if is_complete(place.uri, number):
            with _broken(round_uri(place.uri, number)):
                found.append(_labels_only(load_round(place.uri, number)))
    return found


def _labels_only(done: PublishedRound) -> PublishedRound:
    nothing = np.empty((0, 0), np.float32)
    return replace(
        done, heads=[replace(h, prototypes={}, confusion_KK=nothing) for h in done.heads[:1]]
    )


def _artifacts(place: Location) -> list[Artifact]:
    return [
        Artifact(f"{folder}/{file.name}", file.stat().st_size, _sha256(file))
        for folder in ("encoder", "classifier", "evaluation")
        if place.exists(folder)
        for file in _files(place, folder)
    ]


def _files(place: Location, folder: str) -> Iterator[Path]:
    for name in place.entries(folder):
        with place.fetched(f"{folder}/{name}") as file:
            if file.is_file():
                yield file


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
