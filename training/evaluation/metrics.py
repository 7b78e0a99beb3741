"""METRICS, the table of all that evaluation measures of a run's models.

Pure: knows nothing of how models are applied or where results go. A new metric is one entry here
(its function in `scores`, `probes` or `retrieval`): results.json, the command's table, the report,
MLflow and ablations read the table. Invariant: the clips that are measured choose nothing; the
pairs whose accuracy is measured are chosen on training clips.

Shapes: M clips measured, L labels of a clip, C classes, P embedding width.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.config import STREAMS
from training.evaluation.probes import PROBES
from training.evaluation.retrieval import (
    Vectors,
    class_retrieval,
    retrieval,
    subset_per_class,
)
from training.evaluation.scores import (
    ConfusedPair,
    Labels,
    Scores,
    mean_average_precision,
    pair_accuracy,
    topk_accuracy,
)

BOTH_SIDES = "audio_video"
"""Probe of audio and video side by side: fair to encoders whose fusion pass was never trained."""

Values = Mapping[str, float]
"""Of one metric: by stream, or by the names the metric gives them."""


class Evidence(NamedTuple):
    """What the metrics are computed from: outputs of a run's models on the clips of one split."""

    clip_ids_M: Sequence[str]
    labels_ML: Labels
    """Labels of each clip, the first one first, then -1."""
    classifier: Mapping[str, Scores]
    """Probabilities [M, C] by stream; empty without a classifier."""
    probes: Mapping[str, Mapping[str, Scores]]
    """Scores [M, C] of each probe, by stream and BOTH_SIDES."""
    embeddings: Mapping[str, Vectors]
    """[M, P] by stream, means over the frames that are read."""
    middle_frame: Mapping[str, Vectors]
    """[M, P] by stream, of one pass: the middle frames of as many equal parts of the clip as
    `data.frames_per_clip` says, of the middle frame alone where that is 1 (CAV-MAE's protocol)."""
    confused_pairs: Sequence[ConfusedPair]
    """The most confused pairs of the training clips; those without clips here left out."""
    clusters_M: NDArray[np.int32]
    """Last pseudo-label of each clip, -100 where it was never clustered."""
    retrieval_per_class: int

    @property
    def labels_M(self) -> Labels:
        """The first label of each clip: all that probes, pairs and retrieval know."""
        return self.labels_ML[:, 0]

    @property
    def scores(self) -> Mapping[str, Scores]:
        """The classifier's scores by stream, or without one those of the first probe."""
        if self.classifier:
            return self.classifier
        by_stream = self.probes[PROBES[0].name]
        return {stream: by_stream[stream] for stream in STREAMS if stream in by_stream}

    @property
    def scores_on_pairs(self) -> Mapping[str, Scores]:
        """`scores`, and without a classifier those of both sides too."""
        return self.classifier or self.probes[PROBES[0].name]

    @property
    def scorer(self) -> str:
        """Whose `scores` are."""
        return "classifier" if self.classifier else PROBES[0].name


class Grid(NamedTuple):
    """How values that are not by stream make a table: the name of a value is ROW_COLUMN."""

    rows: tuple[tuple[str, str], ...]
    """(name, title)."""
    columns: tuple[tuple[str, str], ...]


class Metric(NamedTuple):
    """One thing that is measured."""

    name: str
    """Key in results.json; in MLflow `name/stream`."""
    title: str
    needs: Literal["classifier", "features", "embeddings", "pairs"]
    """What has to be there; the metric is left out where it is not."""
    measure: Callable[[Evidence], Values]
    headline: tuple[str, ...]
    """The values shown where there is room for few: on the screen, in an ablation's table."""
    grid: Grid | None = None
    """None: one value a stream."""


def _by_stream(score: Callable[[Scores, Labels], float], given: Evidence) -> Values:
    return {s: score(x_MC, given.labels_ML) for s, x_MC in given.classifier.items()}


def _top5(scores_MC: Scores, labels_M: Labels) -> float:
    return topk_accuracy(scores_MC, labels_M, min(5, scores_MC.shape[1]))


def _of_probe(name: str, given: Evidence) -> Values:
    return {s: topk_accuracy(x_MC, given.labels_M) for s, x_MC in given.probes[name].items()}


def _on_pairs(given: Evidence) -> Values:
    pairs = list(given.confused_pairs)
    return {
        s: pair_accuracy(x_MC, given.labels_M, pairs) for s, x_MC in given.scores_on_pairs.items()
    }


def _retrieval(embeddings: Mapping[str, Vectors], given: Evidence) -> dict[str, float]:
    rows = subset_per_class(list(given.clip_ids_M), given.labels_M, given.retrieval_per_class)
    audio, video = (embeddings[side][rows] for side in STREAMS[:2])
    return {"n_clips": float(len(rows)), **retrieval(audio, video)}


def _retrieval_of_means(given: Evidence) -> Values:
    found = _retrieval(given.embeddings, given)
    if np.bincount(given.labels_M).max() > 1:
        audio, video = (given.embeddings[side] for side in STREAMS[:2])
        found |= class_retrieval(audio, video, given.labels_M)
    return found


_RANKS = (("r1", "R@1"), ("r5", "R@5"), ("r10", "R@10"))
_WAYS = (("a2v", "sound → picture"), ("v2a", "picture → sound"))

METRICS: tuple[Metric, ...] = (
    Metric("top1", "top-1", "classifier", partial(_by_stream, topk_accuracy), ("fusion",)),
    Metric("top5", "top-5", "classifier", partial(_by_stream, _top5), ()),
    Metric("map", "mAP", "classifier", partial(_by_stream, mean_average_precision), ()),
    Metric("pair_accuracy", "confused pairs", "pairs", _on_pairs, ("fusion",)),
    *(
        Metric(
            probe.name,
            probe.title,
            "features",
            partial(_of_probe, probe.name),
            (*STREAMS, BOTH_SIDES) if probe is PROBES[0] else (),
        )
        for probe in PROBES
    ),
    Metric(
        "retrieval",
        "retrieval, mean over frames",
        "embeddings",
        _retrieval_of_means,
        ("a2v_r1", "v2a_r1", "a2v_class_r1"),
        Grid(_WAYS, (*_RANKS, ("class_r1", "class R@1"), ("class_map", "class mAP"))),
    ),
    Metric(
        "retrieval_middle_frame",
        "retrieval, one pass (of the middle frame: CAV-MAE's protocol)",
        "embeddings",
        lambda given: _retrieval(given.middle_frame, given),
        ("a2v_r1", "v2a_r1"),
        Grid(_WAYS, _RANKS),
    ),
)


def measure(given: Evidence) -> dict[str, Values]:
    """Every metric whose needs are met, by name."""
    there = {
        "classifier": bool(given.classifier),
        "features": bool(given.probes),
        "embeddings": bool(given.embeddings),
        "pairs": bool(given.confused_pairs),
    }
    return {metric.name: metric.measure(given) for metric in METRICS if there[metric.needs]}


def present(results: Mapping[str, Any]) -> list[Metric]:
    """The metrics that results.json holds, in the order to show them."""
    return [metric for metric in METRICS if isinstance(results.get(metric.name), dict)]


def names(with_classifier: bool) -> list[str]:
    """Metrics that an evaluation with or without a classifier can have."""
    return [m.name for m in METRICS if with_classifier or m.needs != "classifier"]


def headlines() -> list[str]:
    """The few values to compare runs by, as MLflow names them."""
    return [f"{metric.name}/{value}" for metric in METRICS for value in metric.headline]
