"""ReportData: what a run folder holds for its report, each part of it or None.

Knows nothing of how a page looks. A run may lack parts (no fine-tuning, no clustering): that is no
error; a part that is there but cannot be read is.
Invariant: reads only.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clustering.rounds.files import is_complete, load_round, round_uri, rounds_at
from clustering.rounds.protocol import PublishedRound
from training.errors import TrainingError
from training.evaluation.results import (
    ConfusionCounts,
    UnitVectors,
    read_confusion,
    read_embeddings,
)
from training.report.curves import Columns, columns_of
from training.tracking.copier import read_metrics

T = TypeVar("T")


class Artifact(NamedTuple):
    """A file that the run produced."""

    name: str
    size: int
    sha256: str


class ReportData(NamedTuple):
    """All a report needs of a run."""

    path: Path
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


def read_run(folder: str | Path) -> ReportData:
    """Read what a run left behind.

    Raises: TrainingError if it is no run folder, or a part of it is broken.
    """
    path = Path(folder)
    if not (path / "run.json").exists() and not (path / "results.json").exists():
        raise TrainingError(
            f"{path}: no run folder (neither run.json nor results.json is in it); "
            "give the --out of a pretrain, finetune or demo run"
        )
    run = _json(path / "run.json")
    results = _json(path / "results.json")
    config = path / "config.yaml"
    evaluation = path / "evaluation"
    return ReportData(
        path=path,
        run=run,
        results=results,
        config_yaml=config.read_text() if config.exists() else "",
        metrics=_columns(path / "metrics.jsonl"),
        finetuning=_columns(path / "finetune.jsonl", "finetune/"),
        rounds=_rounds(path / "rounds"),
        confusion=_read(evaluation / "confusion.npz", read_confusion),
        predictions=_read(evaluation / "predictions.parquet", pq.read_table),
        embeddings=_read(evaluation / "embeddings.npz", _sound_and_picture),
        artifacts=_artifacts(path),
    )


def _read(file: Path, read: Callable[[Path], T]) -> T | None:
    if not file.exists():
        return None
    try:
        return read(file)
    except (OSError, ValueError, KeyError, BadZipFile, pa.ArrowException) as error:
        raise TrainingError(
            f"{file}: cannot be read ({error}); run the evaluation again, or remove the file to "
            "leave its part out of the report"
        ) from error


def _sound_and_picture(file: Path) -> UnitVectors:
    """Without the vectors of fusion, for which no example is looked up: 50 MB of VGGSound's."""
    ids, vectors = read_embeddings(file)
    return UnitVectors(ids, {s: vectors[s] for s in ("audio", "video") if s in vectors})


def _columns(file: Path, prefix: str = "") -> Columns:
    return _read(file, lambda f: columns_of(read_metrics(f), prefix)) or {}


def _json(file: Path) -> dict[str, Any]:
    return _read(file, lambda f: json.loads(f.read_text())) or {}


def _rounds(folder: Path) -> list[PublishedRound]:
    """Completed rounds, published or withheld, in order."""
    if not folder.exists():
        return []
    uri = str(folder)
    done = [Path(round_uri(uri, n)) for n in rounds_at(uri) if is_complete(uri, n)]
    return [found for each in done if (found := _read(each, _round)) is not None]


def _round(folder: Path) -> PublishedRound:
    return _labels_only(load_round(str(folder.parent), int(folder.name.removeprefix("round-"))))


def _labels_only(done: PublishedRound) -> PublishedRound:
    nothing = np.empty((0, 0), np.float32)
    return replace(
        done, heads=[replace(h, prototypes={}, confusion_KK=nothing) for h in done.heads[:1]]
    )


def _artifacts(path: Path) -> list[Artifact]:
    files = [
        file
        for folder in ("encoder", "classifier", "evaluation")
        for file in sorted((path / folder).glob("*"))
        if file.is_file()
    ]
    return [Artifact(str(f.relative_to(path)), f.stat().st_size, _sha256(f)) for f in files]


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
