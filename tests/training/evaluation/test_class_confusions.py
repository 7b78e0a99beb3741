"""Which class a class is confused with, and which modality tells the two apart."""

import json
from pathlib import Path

import numpy as np
import pytest

from training.evaluation.class_confusions import class_confusions
from training.evaluation.predictions import About, Predictions
from training.evaluation.results import ConfusionCounts
from training.evaluation.scores import confusion_counts
from training.predict.told import confusion_sentence
from training.weights.measured import (
    ClassConfusion,
    Measured,
    ToldApart,
    read_measured,
    write_measured,
)

CLASSES = ["a", "b", "c", "never"]


def _found(labels: list[int], **scores: list[list[float]]) -> list[ClassConfusion]:
    """Of clips with these labels and, by stream, these scores of the first classes."""
    labels_M, n_classes = np.array(labels), len(CLASSES)
    full = {s: np.zeros((len(labels), n_classes), np.float32) for s in scores}
    for stream, rows in scores.items():
        full[stream][:, : len(rows[0])] = rows
    counts = {s: confusion_counts(labels_M, x.argmax(1), n_classes) for s, x in full.items()}
    ids = [str(i) for i in range(len(labels))]
    about = About(CLASSES, "classifier", "", "test")
    none = np.full(len(labels), -100, np.int32)
    given = Predictions(ids, ids, labels_M, about, full, none)
    return class_confusions(ConfusionCounts(CLASSES, counts), given)


A, B, C = [1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.5, 0.4, 1.0]
"""Scores of a clip taken for a, for b, and for c, with a above b."""


def test_the_other_class_is_the_one_of_the_highest_mutual_degree() -> None:
    labels = [0] * 10 + [1] * 10 + [2] * 10
    fusion = [A] * 6 + [B] * 4 + [A] * 2 + [B] * 8 + [A] + [C] * 9
    audio = [A] * 9 + [B] + [B] * 6 + [C] * 4 + [C] * 10
    found = _found(labels, audio=audio, fusion=fusion)
    assert [(each.name, each.other) for each in found] == [("a", "b"), ("b", "a"), ("c", "a")]
    first = found[0]
    assert first.degree == pytest.approx((0.4 + 0.2) / 2)
    assert first.n_clips == 20
    # The four clips of b that audio took for c have a above b.
    assert first.told_apart == {"audio": ToldApart(15, 20), "fusion": ToldApart(14, 20)}


def test_a_stream_that_hardly_knows_the_classes_does_not_decide_by_the_few_clips_it_knows() -> None:
    """Audio is right on 90 of 99 clips, video on the one that it took for either; its others went
    elsewhere."""
    labels = [0] * 50 + [1] * 49
    right = [A] * 50 + [B] * 49
    audio = [B] * 5 + right[5:-4] + [A] * 4
    lost = [[0.5, 0.4, 1.0], [0.4, 0.5, 1.0]]
    video = [A, *(lost[i % 2] for i in range(98))]
    found = _found(labels, audio=audio, video=video, fusion=audio)[0]
    assert found.told_apart["audio"] == ToldApart(90, 99)
    assert found.told_apart["video"].n_clips == 99
    assert found.decided_by == "audio"


def _decided(n: int, audio: int, video: int, n_first: int | None = None) -> str | None:
    """Of n clips, half of them (or so many) of the first class; each stream errs on the last."""
    n_first = n // 2 if n_first is None else n_first
    labels = [0, 1] * min(n_first, n - n_first)
    labels += [int(n_first < n - n_first)] * (n - len(labels))
    scores = {
        stream: [[A, B][label ^ (i >= right)] for i, label in enumerate(labels)]
        for stream, right in (("audio", audio), ("video", video))
    }
    return _found(labels, **scores, fusion=scores["video"])[0].decided_by


def test_a_modality_decides_beyond_chance_only() -> None:
    assert _decided(40, 36, 20) == "audio"
    assert _decided(40, 20, 36) == "video"
    assert _decided(40, 30, 30) is None
    # Two clips more.
    assert _decided(40, 32, 30) is None
    # Better than the other one, and no better than a coin.
    assert _decided(40, 20, 4) is None
    # As good as naming the class that has nearly all clips.
    assert _decided(100, 90, 50, n_first=90) is None
    # All of a handful.
    assert _decided(4, 4, 1) is None


def test_nothing_decides_where_one_modality_is_missing() -> None:
    labels = [0] * 20 + [1] * 20
    audio = [B] * 2 + [A] * 18 + [B] * 20
    assert _found(labels, audio=audio)[0].decided_by is None


def test_what_an_older_version_counted_is_read_and_not_told(tmp_path: Path) -> None:
    told = {"audio": ToldApart(90, 99), "video": ToldApart(1, 1)}
    old = ClassConfusion("a", "b", 0.1, 99, told, "video")
    write_measured(str(tmp_path), Measured("digest", "test", 99, {}, {}, {}, [old]))
    file = tmp_path / "measured.json"
    assert read_measured(str(tmp_path), "digest") is not None
    stored = json.loads(file.read_text())
    del stored["format"]
    file.write_text(json.dumps(stored))
    found = read_measured(str(tmp_path), "digest")
    assert found is not None
    [confusion] = found.confusions
    assert (confusion.other, confusion.degree, confusion.n_clips) == ("b", 0.1, 99)
    assert (confusion.told_apart, confusion.decided_by) == ({}, None)
    assert "run diccae evaluate again" in confusion_sentence(confusion)
