"""Reads a run folder into typed parts, each of them or None.

Knows nothing of how a page looks. A run may lack parts (no fine-tuning, no clustering): that is no
error; a part that is there but cannot be read is.
Invariant: reads only.

Shapes: N clips, C classes, P projection width.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from training.config import STREAMS
from training.errors import TrainingError
from training.tracking.copier import read_metrics


class Confusion(NamedTuple):
    """Counts of test clips by true and predicted class."""

    classes: list[str]
    counts: dict[str, NDArray[np.int64]]
    """By stream, [C, C], rows are the truth."""


class Embeddings(NamedTuple):
    """Unit vectors of the test clips."""

    clip_ids: list[str]
    vectors: dict[str, NDArray[np.float32]]
    """By stream, [N, P]."""


class Round(NamedTuple):
    """One round of clustering."""

    number: int
    ok: bool
    reason: str
    effective_step: int | None
    health: dict[str, float]
    keys_N: NDArray[np.uint64]
    labels_N: NDArray[np.int32]
    """Labels of the first head; both empty if the round was withheld."""


class Artifact(NamedTuple):
    """A file that the run produced."""

    name: str
    size: int
    sha256: str


class RunFolder(NamedTuple):
    """All a report needs of a run."""

    path: Path
    run: dict[str, Any]
    results: dict[str, Any]
    config_yaml: str
    metrics: list[dict[str, Any]]
    """Lines of pretraining."""
    finetuning: list[dict[str, Any]]
    """Lines of fine-tuning, which counts its own steps; names without `finetune/`."""
    rounds: list[Round]
    confusion: Confusion | None
    predictions: pa.Table | None
    embeddings: Embeddings | None
    artifacts: list[Artifact]


def read_run(folder: str | Path) -> RunFolder:
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
    finetuning = [
        {name.removeprefix("finetune/"): value for name, value in line.items()}
        for line in _lines(path / "finetune.jsonl")
    ]
    evaluation = path / "evaluation"
    return RunFolder(
        path=path,
        run=run,
        results=results,
        config_yaml=config.read_text() if config.exists() else "",
        metrics=_lines(path / "metrics.jsonl"),
        finetuning=finetuning,
        rounds=_rounds(path / "rounds"),
        confusion=_read(evaluation / "confusion.npz", _confusion),
        predictions=_read(evaluation / "predictions.parquet", pq.read_table),
        embeddings=_read(evaluation / "embeddings.npz", _embeddings),
        artifacts=_artifacts(path),
    )


def _read(file: Path, read: Any) -> Any:
    if not file.exists():
        return None
    try:
        return read(file)
    except (OSError, ValueError, KeyError, BadZipFile, pa.ArrowException) as error:
        raise TrainingError(
            f"{file}: cannot be read ({error}); run the evaluation again, or remove the file to "
            "leave its part out of the report"
        ) from error


def _lines(file: Path) -> list[dict[str, Any]]:
    return _read(file, lambda f: list(read_metrics(f))) or []


def _json(file: Path) -> dict[str, Any]:
    return _read(file, lambda f: json.loads(f.read_text())) or {}


def _confusion(file: Path) -> Confusion:
    with np.load(file, allow_pickle=False) as arrays:
        classes = [str(name) for name in arrays["classes"]]
        counts = {str(s): arrays[s].astype(np.int64) for s in STREAMS if s in arrays}
    for stream, matrix in counts.items():
        if matrix.shape != (len(classes), len(classes)):
            raise ValueError(f"{stream} is {matrix.shape} for {len(classes)} classes")
    return Confusion(classes, counts)


def _embeddings(file: Path) -> Embeddings:
    with np.load(file, allow_pickle=False) as arrays:
        vectors = {str(s): arrays[s].astype(np.float32) for s in STREAMS if s in arrays}
        return Embeddings([str(clip_id) for clip_id in arrays["clip_ids"]], vectors)


def _rounds(folder: Path) -> list[Round]:
    """Completed rounds, published or withheld, in order."""
    found = []
    for path in sorted(folder.glob("round-*")):
        health = _json(path / "health.json")
        marker = _json(path / "round.json")
        labels = _read(path / "labels.parquet", pq.read_table)
        if not health and labels is None:
            continue  # begun and never completed
        keys, values = _first_head(labels)
        found.append(
            Round(
                number=int(path.name.removeprefix("round-")),
                ok=bool(marker.get("ok", labels is not None)),
                reason=str(marker.get("reason", "")),
                effective_step=marker.get("effective_step"),
                health={k: v for k, v in health.items() if isinstance(v, int | float)},
                keys_N=keys,
                labels_N=values,
            )
        )
    return found


def _first_head(labels: pa.Table | None) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    if labels is None:
        return np.empty(0, np.uint64), np.empty(0, np.int32)
    head = next(name for name in labels.column_names if name.startswith("label"))
    return labels["key"].to_numpy().astype(np.uint64), labels[head].to_numpy().astype(np.int32)


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
