"""class_confusions: with which class each is most confused, and the stream that tells them apart.

Pure numpy on counts: knows nothing of models or files. Invariant: pairs are ranked by the degree
that results.json ranks them by.

Shapes: C classes.
"""

from collections.abc import Mapping

import numpy as np

from training.config import SIDES
from training.evaluation.results import ConfusionCounts
from training.evaluation.scores import confusion_rates
from training.weights.measured import ClassConfusion, ToldApart


def class_confusions(confusion: ConfusionCounts) -> list[ClassConfusion]:
    """One entry for each class that was ever taken for another one, or another one for it."""
    rates_CC = np.nan_to_num(confusion_rates(confusion.main))
    degree_CC = (rates_CC + rates_CC.T) / 2
    np.fill_diagonal(degree_CC, 0.0)
    found = []
    for k, m in enumerate(degree_CC.argmax(1).tolist()):
        if degree_CC[k, m] == 0:
            continue
        told = {stream: _told(counts_CC, k, m) for stream, counts_CC in confusion.counts.items()}
        told = {stream: each for stream, each in told.items() if each.n_clips}
        found.append(
            ClassConfusion(
                name=confusion.classes[k],
                other=confusion.classes[m],
                degree=float(degree_CC[k, m]),
                n_clips=int(confusion.main[[k, m]].sum()),
                told_apart=told,
                decided_by=_deciding(told),
            )
        )
    return found


def _told(counts_CC: np.ndarray, k: int, m: int) -> ToldApart:
    """Clips of the two that were taken for one of the two, and how many for the right one."""
    pair_22 = counts_CC[np.ix_((k, m), (k, m))]
    return ToldApart(int(np.trace(pair_22)), int(pair_22.sum()))


def _deciding(told: Mapping[str, ToldApart]) -> str | None:
    """The modality that is right more often; None if neither is, or one was never asked."""
    if not all(side in told for side in SIDES):
        return None
    audio, video = (told[side].share for side in SIDES)
    return None if audio == video else SIDES[audio < video]
