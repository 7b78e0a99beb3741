"""Evaluation, the record of what a run is worth, and the files of `evaluation/` behind it.

Knows nothing of how anything was measured. Invariants: `as_json` is strict JSON, so what has no
value is left out rather than NaN; embeddings are kept as the model gave them and have unit length
once read.

evaluation/  predictions.parquet  confusion.npz  embeddings.npz

Shapes: M clips, C classes, P embedding width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.storage import Location
from training.config import STREAMS
from training.evaluation.metrics import Evidence, Values
from training.evaluation.predictions import FILE as PREDICTIONS
from training.evaluation.predictions import About, Predictions, write_predictions
from training.evaluation.retrieval import Vectors, unit_rows
from training.evaluation.scores import (
    ConfusedPair,
    class_accuracies,
    confusion_counts,
    most_confused_pairs,
    taken_as,
)

_WORST_PAIRS = 10


class ClassAccuracy(NamedTuple):
    """How often the clips of one class are recognised."""

    name: str
    n_clips: int
    by_stream: dict[str, float]


class ConfusionSummary(NamedTuple):
    """What is taken for what, in a few numbers."""

    mean_class_error: float
    """Mean over classes of the share of clips taken for another one."""
    worst_pairs: list[ConfusedPair]
    """Of the clips measured."""
    training_pairs: Sequence[ConfusedPair]
    """Of the training clips: those whose accuracy `pair_accuracy` is."""


class Evaluation(NamedTuple):
    """What a run is worth on the clips of a split."""

    n_train: int
    n_test: int
    split: str
    classes: Sequence[str]
    measured: dict[str, Values]
    """By name of the metric."""
    confusion: ConfusionSummary
    class_accuracy: list[ClassAccuracy]
    """Of classes with clips, in the order of classes."""

    def as_json(self) -> dict[str, Any]:
        """As results.json holds it: fractions, classes by name."""
        return {
            "n_train": self.n_train,
            "n_test": self.n_test,
            "split": self.split,
            **{name: dict(values) for name, values in self.measured.items()},
            "confusion": {
                "mean_class_error": self.confusion.mean_class_error,
                "worst_pairs": self._named(self.confusion.worst_pairs),
                "training_pairs": self._named(self.confusion.training_pairs),
            },
            "class_accuracy": [
                {"class": each.name, "n_clips": each.n_clips, **each.by_stream}
                for each in self.class_accuracy
            ],
        }

    def _named(self, pairs: Sequence[ConfusedPair]) -> list[list[Any]]:
        return [[self.classes[p.first], self.classes[p.second], p.degree] for p in pairs]


class ConfusionCounts(NamedTuple):
    """Clips by true and predicted class."""

    classes: list[str]
    counts: dict[str, NDArray[np.int64]]
    """By stream, [C, C], rows are the truth."""

    @property
    def main(self) -> NDArray[np.int64]:
        """Those of the fusion stream, or of the only one there is."""
        return self.counts.get("fusion", next(iter(self.counts.values())))

    def summary(self, training_pairs: Sequence[ConfusedPair]) -> ConfusionSummary:
        """The whole in a few numbers."""
        right_C = class_accuracies(self.main)
        return ConfusionSummary(
            float(1.0 - right_C[~np.isnan(right_C)].mean()),
            most_confused_pairs(self.main, _WORST_PAIRS),
            training_pairs,
        )

    def accuracies(self) -> list[ClassAccuracy]:
        """Each class that has clips, by stream."""
        by_stream = {s: class_accuracies(counts_CC) for s, counts_CC in self.counts.items()}
        n_clips_C = self.main.sum(1)
        return [
            ClassAccuracy(name, int(n), {s: float(x_C[k]) for s, x_C in by_stream.items()})
            for k, (name, n) in enumerate(zip(self.classes, n_clips_C, strict=True))
            if n
        ]


def count_confusion(given: Evidence, classes: Sequence[str]) -> ConfusionCounts:
    """What the clips of each class are taken for, by stream."""
    counts = {
        s: confusion_counts(taken_as(given.labels_ML, x_MC.argmax(1)), x_MC.argmax(1), len(classes))
        for s, x_MC in given.scores.items()
    }
    return ConfusionCounts(list(classes), counts)


def write_evaluation(
    folder: Location,
    given: Evidence,
    confusion: ConfusionCounts,
    groups: Mapping[str, str],
    about: About,
) -> None:
    """Write predictions, counts and embeddings. Args: groups: by clip id, its own where unknown."""
    clip_ids = list(given.clip_ids_M)
    predictions = Predictions(
        clip_ids=clip_ids,
        groups=[groups.get(clip_id, clip_id) for clip_id in clip_ids],
        labels_M=given.labels_M.astype(np.int64),
        about=about,
        scores={s: x_MC.astype(np.float32, copy=False) for s, x_MC in given.scores.items()},
        clusters_M=given.clusters_M,
    )
    with folder.written(PREDICTIONS) as path:
        write_predictions(path, predictions)
    counts: dict[str, Any] = {"classes": np.array(confusion.classes), **confusion.counts}
    with folder.written("confusion.npz") as path:
        np.savez_compressed(path, **counts)
    vectors: dict[str, Any] = {"clip_ids": np.array(given.clip_ids_M), **given.embeddings}
    with folder.written("embeddings.npz") as path:
        np.savez_compressed(path, **vectors)


def read_confusion(file: Path) -> ConfusionCounts:
    """Raises: ValueError or KeyError if the file holds something else."""
    with np.load(file, allow_pickle=False) as arrays:
        classes = [str(name) for name in arrays["classes"]]
        counts = {str(s): arrays[s].astype(np.int64) for s in STREAMS if s in arrays}
    for stream, matrix in counts.items():
        if matrix.shape != (len(classes), len(classes)):
            raise ValueError(f"{stream} is {matrix.shape} for {len(classes)} classes")
    return ConfusionCounts(classes, counts)


class UnitVectors(NamedTuple):
    """Vectors of the clips, each of length 1: their dot products are cosines."""

    clip_ids: list[str]
    vectors: Mapping[str, Vectors]
    """By stream, [M, P]."""


def read_embeddings(file: Path) -> UnitVectors:
    """Raises: ValueError or KeyError if the file holds something else."""
    with np.load(file, allow_pickle=False) as arrays:
        vectors = {str(s): unit_rows(arrays[s]) for s in STREAMS if s in arrays}
        return UnitVectors([str(clip_id) for clip_id in arrays["clip_ids"]], vectors)
