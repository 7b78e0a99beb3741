"""ErrorSplit: which errors of a stream are confusions, and which are the labels' own.

VGGSound gives a clip one label; often more are true, and some can only be heard or only be seen.
So an error is one of KINDS, told apart by all labels that are true of the clip. Pure: knows
nothing of files or pages. Invariant: the kinds of a stream's errors sum to its errors, and
clips that VGGSounder does not judge are in none.

Shapes: M clips predicted, T clips judged, C classes, R labels of clips.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.evaluation.predictions import Predictions
from training.vggsounder.labels import TrueLabels
from training.vggsounder.scores import columns_of

KINDS = {
    "real": "confused: the class was there to be perceived, what was said was not",
    "both_true": "both labels are true: the clip's own and the one that was said",
    "label_false": "only what was said is true: the clip's own label is not",
    "not_perceivable": "the class can be neither perceived in this stream, nor what was said",
}
"""Of errors. What is true of a clip but cannot be perceived in the stream counts as not true in
what it *says*: hearing a thing that can only be seen is no merit."""
_PERCEIVED = {"audio": ("A", "AV"), "video": ("V", "AV"), "fusion": ("A", "V", "AV")}
"""The modalities of labels that a stream can perceive."""
_PAIRS = 20


class ErrorSplit(NamedTuple):
    """The errors of one stream on the clips judged."""

    n_clips: int
    n_errors: int
    n_right_unperceived: int
    """Right by the clip's label, which cannot be perceived in the stream: context, or luck."""
    kinds: dict[str, int]
    pairs: list[tuple[str, str, dict[str, int]]]
    """Most frequent errors: true class, class said, errors by kind."""

    def as_json(self) -> dict[str, Any]:
        """As results.json holds it; shares are of the errors."""
        n = max(self.n_errors, 1)
        return {
            "n_clips": self.n_clips,
            "error": self.n_errors / max(self.n_clips, 1),
            "n_errors": self.n_errors,
            "n_right_unperceived": self.n_right_unperceived,
            "kinds": {k: {"n": v, "share": v / n} for k, v in self.kinds.items()},
            "pairs": [
                {"label": label, "said": said, "n": sum(kinds.values()), **kinds}
                for label, said, kinds in self.pairs
            ],
        }


def split_errors(predictions: Predictions, labels: TrueLabels) -> dict[str, ErrorSplit]:
    """By stream: errors of top-1 against the clips' own labels, by what they are."""
    classes, _ = columns_of(predictions.about.classes, labels.classes)
    position = {name: i for i, name in enumerate(classes)}
    of_own = np.array([position[name] for name in predictions.about.classes], np.int64)
    rows = {clip_id: i for i, clip_id in enumerate(predictions.clip_ids)}
    row_T = np.array([rows.get(clip_id, -1) for clip_id in labels.clip_ids], np.int64)
    judged_T = row_T >= 0
    own_T = of_own[predictions.labels_M[row_T]]
    found = {}
    for stream, scores_MC in predictions.scores.items():
        said_T = of_own[scores_MC.argmax(1)[row_T]]
        true = _truth(labels, len(classes), _PERCEIVED["fusion"])
        perceived = _truth(labels, len(classes), _PERCEIVED[stream])
        found[stream] = _split(own_T[judged_T], said_T[judged_T], true[judged_T],
                               perceived[judged_T], classes)  # fmt: skip
    return found


def _truth(labels: TrueLabels, n_classes: int, modalities: tuple[str, ...]) -> NDArray[np.bool_]:
    """Which classes are true of each clip in one of the modalities: [T, C]."""
    true_TC = np.zeros((len(labels.clip_ids), n_classes), bool)
    which = np.isin(labels.modality_R, modalities)
    true_TC[labels.clip_R[which], labels.class_R[which]] = True
    return true_TC


def _split(
    own_T: NDArray[np.int64],
    said_T: NDArray[np.int64],
    true_TC: NDArray[np.bool_],
    perceived_TC: NDArray[np.bool_],
    classes: list[str],
) -> ErrorSplit:
    each = np.arange(len(own_T))
    own_true, own_perceived = true_TC[each, own_T], perceived_TC[each, own_T]
    said_perceived, wrong = perceived_TC[each, said_T], own_T != said_T
    kinds: Mapping[str, NDArray[np.bool_]] = {
        "real": wrong & ~said_perceived & own_perceived,
        "both_true": wrong & said_perceived & own_true,
        "label_false": wrong & said_perceived & ~own_true,
        "not_perceivable": wrong & ~said_perceived & ~own_perceived,
    }
    pairs, counts = np.unique(
        np.stack([own_T[wrong], said_T[wrong]], axis=1), axis=0, return_counts=True
    )
    worst = pairs[np.argsort(-counts, kind="stable")[:_PAIRS]]
    return ErrorSplit(
        n_clips=len(own_T),
        n_errors=int(wrong.sum()),
        n_right_unperceived=int((~wrong & ~own_perceived).sum()),
        kinds={name: int(which.sum()) for name, which in kinds.items()},
        pairs=[
            (
                classes[own],
                classes[said],
                {
                    name: int((which & (own_T == own) & (said_T == said)).sum())
                    for name, which in kinds.items()
                },
            )
            for own, said in worst.tolist()
        ],
    )
