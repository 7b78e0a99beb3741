"""Chooses the clips a report shows: of confused pairs, of clusters, of retrieval.

Pure numpy on ids, labels and vectors. Knows nothing of stores or pictures.
Invariant: the choice depends on the data alone, so two reports of a run show the same clips.

Shapes: N clips, P projection width, K clusters.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clustering.kmeans.label_table import NO_LABEL
from training.report.confusions import Pair


class Example(NamedTuple):
    """A clip in a picture strip."""

    clip_id: str
    caption: str
    mark: str
    """"right", "wrong", "same" (same class) or "" (nothing to say)."""
    about: str = ""
    """What a caption has no room for."""


def pair_examples(
    predictions: pa.Table, classes: list[str], pair: Pair, each: int = 4
) -> tuple[list[Example], list[Example]]:
    """Test clips of both classes of a pair: those taken for the other first, surest first."""
    return (
        _of_class(predictions, classes, pair.a, pair.b, each),
        _of_class(predictions, classes, pair.b, pair.a, each),
    )


def _of_class(
    predictions: pa.Table, classes: list[str], truth: int, other: int, most: int
) -> list[Example]:
    label = predictions["label"].to_numpy()
    predicted = predictions["pred_fusion"].to_numpy()
    sure = predictions["p_fusion"].to_numpy()
    own = np.flatnonzero(label == truth)
    own = own[np.argsort(-sure[own], kind="stable")]
    confused = own[predicted[own] == other]
    right = own[predicted[own] == truth]
    # One place is kept for a clip that went right, so that the class itself can be seen.
    keep = [*confused[: most - 1], *right, *confused[most - 1 :]][:most]
    ids = predictions["clip_id"]
    return [
        Example(
            ids[int(index)].as_py(),
            f"{100 * sure[index]:.0f} %",
            "right" if predicted[index] == truth else "wrong",
            f"taken for {_name(classes, predicted[index])}",
        )
        for index in keep
    ]


def _name(classes: list[str], index: int) -> str:
    return classes[index] if 0 <= index < len(classes) else f"class {index}"


class Cluster(NamedTuple):
    """One cluster of the last round, with clips to look at."""

    label: int
    size: int
    majority: str
    purity: float
    """Share of its labelled clips that bear the majority label; nan without labels."""
    examples: list[Example]


def cluster_examples(
    keys_N: NDArray[np.uint64],
    labels_N: NDArray[np.int32],
    clip_of: dict[int, tuple[str, str]],
    most: int = 24,
    each: int = 6,
) -> tuple[list[Cluster], int]:
    """The largest clusters and how many there are; clips by key, which is as good as at random.

    Args: clip_of: clip id and true label ("" if none) by key; unknown keys are not shown.
    """
    order = np.argsort(labels_N, kind="stable")
    values, starts = np.unique(labels_N[order], return_index=True)
    members = dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))
    members.pop(NO_LABEL, None)
    largest = sorted(members, key=lambda k: (-len(members[k]), k))[:most]
    clusters = []
    for k in largest:
        known = [clip_of[int(key)] for key in np.sort(keys_N[members[k]]) if int(key) in clip_of]
        clusters.append(_cluster(k, len(members[k]), known, each))
    return clusters, len(members)


def _cluster(label: int, size: int, clips: list[tuple[str, str]], each: int) -> Cluster:
    truths = [truth for _, truth in clips if truth]
    majority, purity = "", float("nan")
    if truths:
        names, counts = np.unique(np.array(truths, dtype=object).astype(str), return_counts=True)
        best = int(np.argmax(counts))
        majority, purity = str(names[best]), float(counts[best] / len(truths))
    examples = [
        Example(clip_id, truth, "" if truth in (majority, "") else "wrong")
        for clip_id, truth in clips[:each]
    ]
    return Cluster(label, size, majority, purity, examples)


class Query(NamedTuple):
    """A sound and the pictures found for it."""

    query: Example
    label: str
    found: list[Example]
    rank: int
    """Position of the clip's own picture among all, from 1."""


def retrieval_examples(
    clip_ids: list[str],
    audio_NP: NDArray[np.float32],
    video_NP: NDArray[np.float32],
    label_of: dict[str, str],
    queries: int = 8,
    each: int = 5,
) -> list[Query]:
    """Sounds of test clips with the nearest pictures, over as many classes as there is room for.

    The sounds are the first of each class by clip id: no picking of good ones.
    """
    chosen: dict[str, int] = {}
    for index in sorted(range(len(clip_ids)), key=lambda i: clip_ids[i]):
        chosen.setdefault(label_of.get(clip_ids[index], clip_ids[index]), index)
    labels = sorted(chosen)
    picked = [labels[i] for i in _spread(len(labels), queries)]
    found = []
    for label in picked:
        index = chosen[label]
        scores = video_NP @ audio_NP[index]
        nearest = np.argsort(-scores, kind="stable")
        rank = int(np.flatnonzero(nearest == index)[0]) + 1
        results = [
            _result(clip_ids, label_of, int(hit), index, float(scores[hit]))
            for hit in nearest[:each]
        ]
        known = label_of.get(clip_ids[index], "")
        found.append(Query(Example(clip_ids[index], known, ""), known, results, rank))
    return found


def _spread(n: int, most: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))}) if n else []


def _result(
    clip_ids: list[str], label_of: dict[str, str], hit: int, query: int, score: float
) -> Example:
    truth = label_of.get(clip_ids[hit], "")
    same = truth and truth == label_of.get(clip_ids[query])
    mark = "right" if hit == query else "same" if same else "wrong"
    return Example(clip_ids[hit], truth, mark, f"cosine {score:.2f}")
