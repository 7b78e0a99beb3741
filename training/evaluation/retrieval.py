"""Retrieval between audio and video embeddings of the same clips.

Pure numpy on arrays: knows nothing of encoders or files. Invariants: ties count against, so that
collapsed embeddings score as bad as they are; the subset depends on clip ids, not on row order.

Shapes: N clips, P embedding width.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating]
_ROWS = 512
"""Queries compared at a time; bounds memory at a few times _ROWS * N."""
_PER_UNIT = 1_000_000
"""Steps of the cosines that are compared: equal embeddings must tie, whatever order a matrix
product sums in."""
_LAST = 4 * _PER_UNIT
"""Sorts behind every cosine, and is no clip of the own class."""


def subset_per_class(
    clip_ids: Sequence[str], labels_N: NDArray[np.integer], per_class: int = 5
) -> NDArray[np.int64]:
    """Row numbers of `per_class` clips of each class (all of a smaller class), ascending.

    The order of a hash of the clip id decides: CAV-MAE's protocol of 5 clips per class without its
    list of clips.
    """
    if len(clip_ids) != len(labels_N):
        raise ValueError(f"{len(clip_ids)} clip ids for {len(labels_N)} labels")
    digests = [hashlib.blake2b(clip_id.encode(), digest_size=8).digest() for clip_id in clip_ids]
    rank = {row: i for i, row in enumerate(sorted(range(len(digests)), key=digests.__getitem__))}
    chosen: list[int] = []
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label).tolist()
        chosen += sorted(rows, key=rank.__getitem__)[:per_class]
    return np.array(sorted(chosen), dtype=np.int64)


def retrieval(
    audio_NP: Vectors, video_NP: Vectors, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall at k in both directions by cosine: keys `a2v_r1`, ..., `v2a_r10`, and median ranks.

    A clip is found at k if its own counterpart is among the k most similar ones.

    Raises: ValueError for other than two finite [N, P] arrays of the same shape.
    """
    _check(audio_NP, video_NP)
    found: dict[str, float] = {}
    for name, queries, gallery in (("a2v", audio_NP, video_NP), ("v2a", video_NP, audio_NP)):
        ranks = []
        for start, cosines in _cosines(queries, gallery):
            own = cosines[np.arange(len(cosines)), start + np.arange(len(cosines))][:, None]
            ranks.append((cosines >= own).sum(1) - 1)
        ranks_N = np.concatenate(ranks)
        found |= {f"{name}_r{k}": float((ranks_N < k).mean()) for k in ks}
        found[f"{name}_median_rank"] = float(np.median(ranks_N) + 1)
    return found


def class_retrieval(
    audio_NP: Vectors, video_NP: Vectors, labels_N: NDArray[np.integer]
) -> dict[str, float]:
    """Whether clips of the same class come first: `a2v_class_r1`, `a2v_class_map` and v2a likewise.

    The own counterpart of a query is left out of its gallery, so this asks for the class and not
    for the clip; clips that are alone in their class are not asked.

    Raises: ValueError as `retrieval`, or if no class has two clips.
    """
    _check(audio_NP, video_NP)
    counts = np.unique_counts(labels_N)
    asked = np.isin(labels_N, counts.values[counts.counts > 1])
    if not asked.any():
        raise ValueError("class retrieval needs a class with two clips")
    found: dict[str, float] = {}
    for name, queries, gallery in (("a2v", audio_NP, video_NP), ("v2a", video_NP, audio_NP)):
        first, precision = [], []
        for start, cosines in _cosines(queries, gallery):
            rows = start + np.arange(len(cosines))
            same = labels_N[rows][:, None] == labels_N[None]
            # One number to sort by: among equal cosines, clips of other classes come first.
            keys = cosines * -2 + same
            keys[np.arange(len(keys)), rows] = _LAST
            keys = np.sort(keys[asked[rows]], axis=1)
            first.append(keys[:, 0] & 1)
            precision.append(_average_precisions(keys & 1))
        found[f"{name}_class_r1"] = float(np.concatenate(first).mean())
        found[f"{name}_class_map"] = float(np.concatenate(precision).mean())
    return found


def _average_precisions(hits_rN: NDArray[np.integer]) -> NDArray[np.float64]:
    """Mean precision at the hits (1, else 0) of each row, which has at least one: [rows]."""
    rows, places = np.nonzero(hits_rN)
    n_hits_r = np.bincount(rows, minlength=len(hits_rN))
    firsts_r = n_hits_r.cumsum() - n_hits_r
    nth = np.arange(1, len(rows) + 1) - firsts_r[rows]
    return np.bincount(rows, nth / (places + 1), len(hits_rN)) / n_hits_r


def unit_rows(x_NP: Vectors) -> NDArray[np.float32]:
    """Rows scaled to unit length, float32; rows of zeros stay. The one place that normalises."""
    x = np.asarray(x_NP, np.float32)
    norms_N1 = np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    rows: NDArray[np.float32] = np.divide(x, norms_N1, dtype=np.float32)
    return rows


def _cosines(queries_NP: Vectors, gallery_NP: Vectors) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """(first row, cosines [rows, N] in steps of 1e-6) for some queries at a time."""
    queries, gallery = unit_rows(queries_NP), unit_rows(gallery_NP)
    for start in range(0, len(queries), _ROWS):
        cosines = queries[start : start + _ROWS] @ gallery.T
        yield start, np.rint(cosines * np.float32(_PER_UNIT)).astype(np.int32)


def _check(audio_NP: Vectors, video_NP: Vectors) -> None:
    if audio_NP.ndim != 2 or audio_NP.shape != video_NP.shape or not len(audio_NP):
        raise ValueError(f"audio {audio_NP.shape}, video {video_NP.shape}: need the same [N, P]")
    if not (np.isfinite(audio_NP).all() and np.isfinite(video_NP).all()):
        raise ValueError("embeddings are not finite")
