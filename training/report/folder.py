"""ReportData: what a run folder holds for its report, each part of it or None.

Knows nothing of how a page looks. A run may lack parts (no fine-tuning, no clustering): that is no
error; a part that is there but cannot be read is.
Invariant: reads only.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile

import pyarrow as pa
import pyarrow.parquet as pq

from clustering.rounds.files import is_complete, load_round, round_uri, rounds_at
from clustering.rounds.protocol import PublishedRound
from pipeline.storage import Location
from training.errors import TrainingError
from training.evaluation.results import (
    ConfusionCounts,
    UnitVectors,
    read_confusion,
    read_embeddings,
)
from training.tracking.copier import read_metrics

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
    metrics: list[dict[str, Any]]
    """Lines of pretraining."""
    finetuning: list[dict[str, Any]]
    """Lines of fine-tuning, which counts its own steps; names without `finetune/`."""
    rounds: list[PublishedRound]
    confusion: ConfusionCounts | None
    predictions: pa.Table | None
    embeddings: UnitVectors | None
    artifacts: list[Artifact]


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
    run = _json(place, "run.json")
    results = _json(place, "results.json")
    finetuning = [
        {name.removeprefix("finetune/"): value for name, value in line.items()}
        for line in _lines(place, "finetune.jsonl")
    ]
    return ReportData(
        place=place,
        run=run,
        results=results,
        config_yaml=_read(place, "config.yaml", Path.read_text) or "",
        metrics=_lines(place, "metrics.jsonl"),
        finetuning=finetuning,
        rounds=_rounds(place.below("rounds")),
        confusion=_read(place, "evaluation/confusion.npz", read_confusion),
        predictions=_read(place, "evaluation/predictions.parquet", pq.read_table),
        embeddings=_read(place, "evaluation/embeddings.npz", read_embeddings),
        artifacts=_artifacts(place),
    )


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


def _lines(place: Location, name: str) -> list[dict[str, Any]]:
    return _read(place, name, lambda file: list(read_metrics(file))) or []


def _json(place: Location, name: str) -> dict[str, Any]:
    return _read(place, name, lambda file: json.loads(file.read_text())) or {}


def _rounds(place: Location) -> list[PublishedRound]:
    """Completed rounds, published or withheld, in order."""
    found = []
    for number in rounds_at(place.uri):
        if is_complete(place.uri, number):
            with _broken(round_uri(place.uri, number)):
                found.append(load_round(place.uri, number))
    return found


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
