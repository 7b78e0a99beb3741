"""class_confusions: with which class each is most confused, and the stream that tells them apart.

Pure numpy on counts and scores: knows nothing of models or files. Invariants: pairs are ranked by
the degree that results.json ranks them by; streams are compared on the same clips.

Shapes: M clips, C classes, n clips of a pair.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc

from training.config import SIDES
from training.evaluation.predictions import Predictions
from training.evaluation.results import ConfusionCounts
from training.evaluation.scores import mcnemar, mutual_confusion
from training.weights.measured import ClassConfusion, ToldApart

_LEVEL = 0.05
"""Of the tests that a modality passes before it is said to decide."""


def class_confusions(confusion: ConfusionCounts, predictions: Predictions) -> list[ClassConfusion]:
    """One entry for each class that was ever taken for another one, or another one for it.

    Args: predictions: of the clips that were counted.
    """
    degree_CC = mutual_confusion(confusion.main)
    np.fill_diagonal(degree_CC, 0.0)
    found = []
    for k, m in enumerate(degree_CC.argmax(1).tolist()):
        if degree_CC[k, m] == 0:
            continue
        clips_n = np.flatnonzero(np.isin(predictions.labels_M, (k, m)))
        is_k_n = predictions.labels_M[clips_n] == k
        right = {
            stream: _is_right(scores_MC[clips_n][:, [k, m]], is_k_n)
            for stream, scores_MC in predictions.scores.items()
            if len(clips_n)
        }
        found.append(
            ClassConfusion(
                name=confusion.classes[k],
                other=confusion.classes[m],
                degree=float(degree_CC[k, m]),
                n_clips=int(confusion.main[[k, m]].sum()),
                told_apart={s: ToldApart(int(x_n.sum()), len(x_n)) for s, x_n in right.items()},
                decided_by=_deciding(right, is_k_n),
            )
        )
    return found


def _is_right(scores_n2: NDArray[np.float32], is_first_n: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the right one of two classes scores higher, whatever else does: [n]."""
    margin_n = scores_n2[:, 0] - scores_n2[:, 1]
    right_n: NDArray[np.bool_] = np.where(is_first_n, margin_n > 0, margin_n < 0)
    return right_n


def _deciding(right: Mapping[str, NDArray[np.bool_]], is_first_n: NDArray[np.bool_]) -> str | None:
    """The modality that is right more often; None if one was never asked, or chance explains it.

    It has to beat the other one by McNemar's exact test, and the constant answer that is right most
    often by a binomial one; both take clips as independent.
    """
    if not all(side in right for side in SIDES):
        return None
    audio_n, video_n = (right[side] for side in SIDES)
    only_audio, only_video = int((audio_n & ~video_n).sum()), int((video_n & ~audio_n).sum())
    better = SIDES[only_video > only_audio]
    share = max(is_first_n.mean(), 1 - is_first_n.mean())
    by_chance = float(bdtrc(int(right[better].sum()) - 1, len(is_first_n), share))
    return better if max(mcnemar(only_audio, only_video), by_chance) <= _LEVEL else None
