"""Difference: how much more often one of two models is right on the same clips, how surely.

Pure: knows nothing of models or files. Two models are compared clip by clip: what makes a clip
hard is in both and falls out. Invariants: an interval is of recordings drawn again, not of clips,
since clips of one recording are not independent; equal arguments give equal intervals.

Shapes: M clips, G groups of clips, K questions, B resamples.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from training.evaluation.scores import mcnemar

_CHUNK = 100
"""Resamples at a time: all at once are a quarter of a gigabyte for VGGSound's test clips."""


class Question(NamedTuple):
    """Clips to compare on, and whether the event happened to each of the two models."""

    name: tuple[str, ...]
    clips: NDArray[np.int64]
    """Positions among M."""
    a: NDArray[np.bool_]
    b: NDArray[np.bool_]


class Difference(NamedTuple):
    """The answer to one question: b minus a."""

    name: tuple[str, ...]
    n_clips: int
    n_groups: int
    a: float
    """Share of the clips."""
    b: float
    difference: float
    low: float
    """95 % interval: percentiles of a bootstrap over groups; NaN for fewer than two groups."""
    high: float
    only_a: int
    only_b: int
    p: float
    """Exact McNemar test, two-sided: of a and b differing in clips; takes clips as independent."""
    p_holm: float
    """Corrected for the number of questions asked together (Holm); at most 1."""


def differences(
    families: Sequence[Sequence[Question]],
    groups_M: NDArray[np.int64],
    resamples: int = 2000,
    seed: int = 0,
) -> list[list[Difference]]:
    """Answer families of questions; p values are corrected within each. Without clips, no answer.

    Args: groups_M: 0..G-1, the recording of a clip.
    """
    asked = [[question for question in family if len(question.clips)] for family in families]
    every = [question for family in asked for question in family]
    if not every:
        return [[] for _ in families]
    intervals = iter(_intervals(every, groups_M, resamples, seed).tolist())
    found = []
    for family in asked:
        answers = [_answer(question, groups_M, *next(intervals)) for question in family]
        corrected = holm(np.array([answer.p for answer in answers]))
        found.append([x._replace(p_holm=float(p)) for x, p in zip(answers, corrected, strict=True)])
    return found


def _answer(q: Question, groups_M: NDArray[np.int64], low: float, high: float) -> Difference:
    only_a, only_b = int((q.a & ~q.b).sum()), int((q.b & ~q.a).sum())
    p = mcnemar(only_a, only_b)
    return Difference(
        name=q.name,
        n_clips=len(q.clips),
        n_groups=len(np.unique(groups_M[q.clips])),
        a=float(q.a.mean()),
        b=float(q.b.mean()),
        difference=(only_b - only_a) / len(q.clips),
        low=low,
        high=high,
        only_a=only_a,
        only_b=only_b,
        p=p,
        p_holm=p,
    )


def holm(p_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's correction of p values that are looked at together: [K]."""
    order = np.argsort(p_K, kind="stable")
    left = len(p_K) - np.arange(len(p_K))
    corrected = np.empty_like(p_K)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p_K[order] * left))
    return corrected


def _intervals(
    questions: Sequence[Question], groups_M: NDArray[np.int64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """2.5 and 97.5 % percentiles of the difference over groups drawn with replacement: [K, 2].

    A resample is how often each group was drawn, so that all questions of it are two products.
    """
    n_groups, n_questions = int(groups_M.max()) + 1, len(questions)
    clips = np.concatenate([q.clips for q in questions])
    of_question = np.repeat(np.arange(n_questions), [len(q.clips) for q in questions])
    gains = np.concatenate([q.b.astype(np.float64) - q.a for q in questions])
    place = (of_question, groups_M[clips])
    shape = (n_questions, n_groups)
    gains_KG = sparse.csr_array((gains, place), shape=shape)
    clips_KG = sparse.csr_array((np.ones(len(clips)), place), shape=shape)
    rng = np.random.default_rng(seed)
    found_KB = np.empty((n_questions, resamples))
    for start in range(0, resamples, _CHUNK):
        n = min(_CHUNK, resamples - start)
        drawn_GB = np.stack(
            [
                np.bincount(rng.integers(0, n_groups, n_groups), minlength=n_groups)
                for _ in range(n)
            ],
            axis=1,
        ).astype(np.float64)
        with np.errstate(invalid="ignore"):
            found_KB[:, start : start + n] = (gains_KG @ drawn_GB) / (clips_KG @ drawn_GB)
    bounds_K2: NDArray[np.float64] = np.nanquantile(found_KB, [0.025, 0.975], axis=1).T
    # The same recording every time: its difference would look certain.
    bounds_K2[np.diff(clips_KG.indptr) < 2] = math.nan
    return bounds_K2
