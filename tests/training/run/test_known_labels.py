"""True labels that are partly wrong: how many, which, and how they differ from share to share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.memory import memory_index
from support.trainers import pretrain_config

from training.config import RoundsConfig
from training.data.rows import few_of_each_class
from training.errors import TrainingError
from training.run.known_labels import Known, known_labels
from training.run.pretrain import rounds_made


def _labels(**config: object) -> np.ndarray:
    rounds = RoundsConfig.model_validate({"labels": "true", **config})
    known = known_labels(rounds, memory_index(), 4, seed=0)
    assert known is not None
    keys_N, labels_N = known.given.table
    return labels_N[np.argsort(keys_N)]


def test_noise_makes_its_share_wrong_and_a_larger_one_adds_to_it() -> None:
    true, some, more = (_labels(label_noise=share) for share in (0.0, 0.3, 0.7))
    every = _labels(label_noise=1.0)
    assert (every != true).all(), "a wrong label is never the clip's own"
    n = len(true)
    assert abs((some != true).mean() - 0.3) < 3 * np.sqrt(0.21 / n)
    changed = some != true
    np.testing.assert_array_equal(more[changed], some[changed])
    assert ((more != true) >= changed).all()


def test_confusable_noise_is_what_an_earlier_run_confused(tmp_path: Path) -> None:
    index = memory_index()
    n = len(index.classes)
    counts = np.eye(n, dtype=np.int64) * 9 + np.roll(np.eye(n, dtype=np.int64), 1, axis=1)
    file = tmp_path / "confusion.npz"
    np.savez_compressed(file, classes=np.array(index.classes), fusion=counts)
    true = _labels()
    wrong = _labels(label_noise=1.0, label_noise_from=str(file))
    np.testing.assert_array_equal(wrong, (true + 1) % n)
    np.savez_compressed(file, classes=np.array(["x"] * n), fusion=counts)
    with pytest.raises(TrainingError, match="that of a run on the same classes"):
        _labels(label_noise=0.1, label_noise_from=str(file))
    with pytest.raises(TrainingError, match="not the confusion"):
        _labels(label_noise=0.1, label_noise_from=str(tmp_path / "none.npz"))


def test_noise_is_of_true_labels() -> None:
    for labels in ("random", "clusters", "none"):
        with pytest.raises(TrainingError, match="corrupts true labels"):
            _labels(labels=labels, label_noise=0.5)


def test_few_labels_are_those_the_probe_sees_true_or_by_chance() -> None:
    index = memory_index()
    rows = few_of_each_class(index.labels_N, 3)
    assert np.bincount(index.labels_N[rows]).tolist() == [3] * len(index.classes)

    def known(labels: str) -> Known | None:
        rounds = RoundsConfig.model_validate({"labels": labels, "labels_per_class": 3})
        return known_labels(rounds, index, 9, seed=0)

    for labels, k in (("true", len(index.classes)), ("seeded", len(index.classes)), ("random", 9)):
        found = known(labels)
        assert found is not None
        assert found.k == k
        assert found.given.seeds == (labels == "seeded")
        assert set(found.given.table.keys_N) == set(index.keys_N[rows])
    assert known("none") is None
    with pytest.raises(TrainingError, match="labels_per_class = 3, but"):
        known("clusters")


@pytest.mark.parametrize("labels", ["true", "seeded"])
def test_a_class_of_other_splits_alone_is_none_of_a_round(labels: str) -> None:
    """Its prototype was zero and its confusion nobody's: half of such classes halved the degree."""
    index = memory_index()
    rounds = {"labels": labels, "margin_nats": -1}
    config = pretrain_config(rounds=rounds, clustering={"k": 9})
    classes = ["only tested", *index.classes[:2], "only tested, too", *index.classes[2:]]
    moved = np.array([1, 2, 4, 5], np.int32)[index.labels_NL]
    more = replace(index, classes=classes, labels_NL=moved)
    made, with_more = (rounds_made(config, train) for train in (index, more))
    assert made is not None
    assert with_more is not None
    assert made.given is not None
    assert with_more.given is not None
    assert made.clustering.k == with_more.clustering.k == len(index.classes)
    for table, same in zip(made.given.table, with_more.given.table, strict=True):
        np.testing.assert_array_equal(table, same)
    assert set(made.given.table.labels_N) == set(range(len(index.classes)))


@pytest.mark.parametrize("labels", ["true", "seeded"])
def test_clips_of_which_none_has_a_label_are_refused_with_the_key(labels: str) -> None:
    index = memory_index()
    unlabelled = replace(index, labels_NL=np.full_like(index.labels_NL, -1))
    rounds = RoundsConfig.model_validate({"labels": labels})
    with pytest.raises(TrainingError, match=f"rounds.labels = {labels} needs labels, and none of"):
        known_labels(rounds, unlabelled, 4, seed=0)
