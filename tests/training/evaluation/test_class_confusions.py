"""Which class a class is confused with, and which modality tells the two apart."""

import numpy as np

from training.evaluation.class_confusions import class_confusions
from training.evaluation.results import ConfusionCounts
from training.weights.measured import ToldApart


def _counts(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int64)


def test_the_other_class_is_the_one_of_the_highest_mutual_degree() -> None:
    fusion = _counts([6, 4, 0, 0], [2, 8, 0, 0], [1, 0, 9, 0], [0, 0, 0, 5])
    audio = _counts([9, 1, 0, 0], [0, 6, 4, 0], [0, 0, 10, 0], [0, 0, 0, 5])
    video = _counts([5, 5, 0, 0], [5, 5, 0, 0], [0, 0, 10, 0], [0, 0, 0, 5])
    counts = {"audio": audio, "video": video, "fusion": fusion}
    found = class_confusions(ConfusionCounts(["a", "b", "c", "never"], counts))
    assert [(each.name, each.other) for each in found] == [("a", "b"), ("b", "a"), ("c", "a")]
    first = found[0]
    assert first.degree == (0.4 + 0.2) / 2
    assert first.n_clips == 20
    # The four clips of b that audio took for c say nothing of a and b.
    assert first.told_apart == {
        "audio": ToldApart(15, 16),
        "video": ToldApart(10, 20),
        "fusion": ToldApart(14, 20),
    }
    assert first.decided_by == "audio"


def test_nothing_decides_where_both_modalities_are_as_good_or_one_is_missing() -> None:
    fusion = _counts([3, 1], [1, 3])
    same = {"audio": fusion, "video": fusion, "fusion": fusion}
    assert class_confusions(ConfusionCounts(["a", "b"], same))[0].decided_by is None
    alone = {"audio": fusion}
    assert class_confusions(ConfusionCounts(["a", "b"], alone))[0].decided_by is None
