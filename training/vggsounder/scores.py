"""VGGSounder's metrics: hit rate, F1 and Jaccard index at k by modality, and modality confusion mu.

Pure numpy: knows nothing of files. A stream is measured on the labels of its modality: audio on
what can be heard (A, AV), video on what can be seen (V, AV), fusion on what is both (AV), audio and
video once more on what is theirs alone. Invariant: the package's own numbers on the same scores,
except where scores are equal (here the lower class comes first, there the order is left to a sort).

Shapes: M clips scored, R labels of clips that are scored, C classes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.evaluation.predictions import Predictions
from training.evaluation.scores import label_ranks
from training.vggsounder.labels import TrueLabels

KS = (1, 3, 5, 10)
SUBSETS: dict[str, tuple[str, bool] | None] = {
    "all": None,
    "background_music": ("background_music", True),
    "no_background_music": ("background_music", False),
    "static_image": ("static_image", True),
    "no_static_image": ("static_image", False),
    "voice_over": ("voice_over", True),
    "no_voice_over": ("voice_over", False),
}
"""Clips by what VGGSounder says of them: a flag and its value; None: all of them."""


class Modality(NamedTuple):
    """One column of VGGSounder's tables."""

    name: str
    stream: str
    labels: tuple[str, ...]
    """The modalities of the labels that count."""


TABLE = (
    Modality("a", "audio", ("A", "AV")),
    Modality("v", "video", ("V", "AV")),
    Modality("av", "fusion", ("AV",)),
    Modality("a only", "audio", ("A",)),
    Modality("v only", "video", ("V",)),
)
STREAM_OF = {"a": "audio", "v": "video", "av": "fusion"}
"""VGGSounder's names of the three streams."""


class Joined(NamedTuple):
    """Scores of a run and VGGSounder's labels, on the clips both have."""

    labels: TrueLabels
    classes: list[str]
    """VGGSounder's, then those that only the run has."""
    scored_T: NDArray[np.int64]
    """Row of each of VGGSounder's clips in the predictions, -1 where it was not predicted."""
    missing_classes: list[str]
    """VGGSounder's that the run cannot say: each of their labels is a miss."""
    ranks: Mapping[str, NDArray[np.int64]]
    """By stream, [R]: how many classes come before each label; of labels without scores, -1."""


def join(predictions: Predictions, labels: TrueLabels) -> Joined:
    """Match clips by id and classes by name: two orders of VGGSound's classes are in use."""
    rows = {clip_id: i for i, clip_id in enumerate(predictions.clip_ids)}
    scored_T = np.array([rows.get(clip_id, -1) for clip_id in labels.clip_ids], np.int64)
    classes, columns = columns_of(predictions.about.classes, labels.classes)
    row_R = scored_T[labels.clip_R]
    have = np.flatnonzero(row_R >= 0)
    ranks: dict[str, NDArray[np.int64]] = {}
    for stream, scores_MC in predictions.scores.items():
        of_R = np.full(len(row_R), -1, np.int64)
        ordered_MC = in_order(scores_MC, columns)
        of_R[have] = label_ranks(ordered_MC[row_R[have]], labels.class_R[have])
        ranks[stream] = of_R
    known = set(predictions.about.classes)
    missing = [name for name in labels.classes if name not in known]
    return Joined(labels, classes, scored_T, missing, ranks)


def columns_of(own: "list[str] | Any", theirs: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """All class names, theirs first, and the column of `own` that each has; -1 for none."""
    position = {name: i for i, name in enumerate(own)}
    classes = [*theirs, *(name for name in own if name not in set(theirs))]
    return classes, np.array([position.get(name, -1) for name in classes], np.int64)


def in_order(scores_MC: NDArray[np.float32], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """Scores with their columns in another order; a class without scores comes after all others."""
    if np.array_equal(columns, np.arange(scores_MC.shape[1])):
        return scores_MC
    ordered = scores_MC[:, columns]
    ordered[:, columns < 0] = -np.inf
    return ordered


def measure(joined: Joined) -> dict[str, Any]:
    """By subset of clips, then by modality: n_clips and each metric; and mu by stream, where
    all three were scored."""
    found: dict[str, Any] = {}
    for name, which in SUBSETS.items():
        flags = joined.labels.flags
        clips_T = joined.scored_T >= 0
        if which is not None:
            clips_T = clips_T & (flags[which[0]] == which[1])
        scores = {
            modality.name: one
            for modality in TABLE
            if modality.stream in joined.ranks and (one := _measure(joined, modality, clips_T))
        }
        found[name] = {**scores, **_confusion(joined, clips_T)}
    return found


def _measure(
    joined: Joined, modality: Modality, clips_T: NDArray[np.bool_]
) -> dict[str, float] | None:
    labels = joined.labels
    counted_R = np.isin(labels.modality_R, modality.labels) & clips_T[labels.clip_R]
    clip_R, rank_R = labels.clip_R[counted_R], joined.ranks[modality.stream][counted_R]
    n_clips, n_labels = len(np.unique(clip_R)), len(clip_R)
    if not n_clips:
        return None
    values: dict[str, float] = {"n_clips": n_clips}
    for k in KS:
        said = n_clips * min(k, len(joined.classes))
        right = int((rank_R < k).sum())
        values[f"hit_rate@{k}"] = len(np.unique(clip_R[rank_R < k])) / n_clips
        values[f"f1@{k}"] = 2 * right / (said + n_labels)
        values[f"jaccard@{k}"] = right / (said + n_labels - right)
    return values


def _confusion(joined: Joined, clips_T: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
    """mu: share of clips that one stream alone, or each alone, gets right and fusion does not."""
    if not clips_T.any() or not set(STREAM_OF.values()) <= joined.ranks.keys():
        return {}
    hits = {}
    for name, stream in STREAM_OF.items():
        hit_T = np.zeros(len(clips_T), bool)
        hit_T[joined.labels.clip_R[joined.ranks[stream] == 0]] = True
        hits[name] = hit_T[clips_T]
    a, v, av = hits["a"], hits["v"], hits["av"]
    confused = {"a": a & ~av, "v": v & ~av, "av": a & v & ~av}
    return {"mu": {name: float(which.mean()) for name, which in confused.items()}}
