"""The label table, the measures of labels, and the collapse guard."""

import numpy as np
import pytest
import sklearn.metrics

from clustering.config import GuardConfig, KMeansConfig
from clustering.errors import ClusteringError
from clustering.kmeans.label_table import LabelTable
from clustering.rounds.health import (
    agreement,
    churn,
    effective_clusters,
    merge_health,
    nmi,
    withheld_because,
)
from clustering.rounds.targets import targets_of


def test_lookup_finds_keys_and_defaults_on_others() -> None:
    keys = np.array([2, 5, 2**64 - 1], dtype=np.uint64)
    labels = np.array([7, 8, 9], dtype=np.int32)
    asked = np.array([5, 0, 2**64 - 1, 3, 2], dtype=np.uint64)
    assert LabelTable(keys, labels).lookup(asked).tolist() == [8, -100, 9, -100, 7]
    assert LabelTable(keys, labels).lookup(asked, default=-1)[1] == -1
    assert LabelTable(keys, labels).lookup(asked).dtype == np.int32
    assert LabelTable(keys[:0], labels[:0]).lookup(asked).tolist() == [-100] * 5


@pytest.mark.parametrize("seed", range(3))
def test_nmi_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(9, size=500), rng.integers(5, size=500)
    b[:300] = a[:300] % 5
    expected = sklearn.metrics.normalized_mutual_info_score(a, b)
    assert nmi(a, b) == pytest.approx(expected, abs=1e-12)
    assert nmi(rng.permutation(9)[a], b) == pytest.approx(expected, abs=1e-12)


def test_agreement_of_known_tables() -> None:
    truth = np.array([0, 0, 0, 1, 1, 1, -1])
    labels = np.array([4, 4, 2, 2, 2, 2, 0])
    found = agreement(labels, truth)
    assert found["purity"] == pytest.approx(5 / 6)
    assert found["hungarian_accuracy"] == pytest.approx(5 / 6)
    assert found["nmi"] == pytest.approx(
        sklearn.metrics.normalized_mutual_info_score(truth[:6], labels[:6])
    )
    assert set(agreement(labels[:0], truth[:0]).values()) == {0.0}


def test_churn_is_over_common_keys_and_ignores_ids() -> None:
    keys = np.arange(6, dtype=np.uint64)
    labels = np.array([0, 0, 1, 1, 2, 2], dtype=np.int32)
    table = LabelTable(keys, labels)
    renamed = LabelTable(keys[1:], np.array([5, 3, 3, 4, 4], dtype=np.int32))
    assert churn(table, renamed) == pytest.approx(0.0, abs=1e-12)
    assert churn(table, None) == 0.0
    assert churn(table, LabelTable(keys + np.uint64(100), labels)) == 1.0


def test_effective_clusters_counts_by_entropy() -> None:
    assert effective_clusters(np.array([5, 5, 5, 0])) == pytest.approx(3.0)
    assert effective_clusters(np.array([7, 0])) == pytest.approx(1.0)


HEALTHY = {"effective_clusters": 20.0, "mean_cosine": 0.1, "churn": 0.2, "coverage": 1.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [("effective_clusters", 2.0), ("mean_cosine", 0.99), ("churn", 0.999), ("coverage", 0.1)],
)
def test_guard_names_what_collapsed(key: str, value: float) -> None:
    assert withheld_because(HEALTHY, 32, GuardConfig()) == ""
    reason = withheld_because({**HEALTHY, key: value}, 32, GuardConfig())
    assert key.replace("_", " ") in reason


def test_health_of_several_heads_is_the_worst() -> None:
    a = {"inertia": 1.0, "n_empty": 0.0, "size_min": 5.0, "mean_cosine": 0.1}
    b = {"inertia": 3.0, "n_empty": 4.0, "size_min": 9.0, "mean_cosine": 0.4}
    merged = merge_health({"x": a, "y": b})
    assert [merged[key] for key in a] == [2.0, 4.0, 5.0, 0.4]
    assert merged["y/n_empty"] == 4.0
    assert merge_health({"x": a}) == a


BANK = {"audio": 4, "video": 4, "fusion": 4}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("mean", {"mean": ("audio", "video", "fusion")}),
        ("concat", {"concat": ("audio", "video", "fusion")}),
        ("own", {"audio": ("audio", "fusion"), "video": ("video", "fusion")}),
        ("swapped", {"audio": ("video", "fusion"), "video": ("audio", "fusion")}),
    ],
)
def test_targets_say_who_learns_from_whom(targets: str, expected: dict) -> None:
    made = targets_of(KMeansConfig(targets=targets), BANK)
    assert {target.name: target.teaches for target in made} == expected


def test_targets_refuse_unknown_streams_and_unequal_widths() -> None:
    with pytest.raises(ClusteringError, match=r"names \['smell'\]"):
        targets_of(KMeansConfig(streams=("audio", "smell")), BANK)
    with pytest.raises(ClusteringError, match="needs slices of one width"):
        targets_of(KMeansConfig(), {"audio": 4, "video": 6})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": "sinkhorn", "spherical": False}, "needs spherical"),
        ({"streams": ("a", "a")}, "names one twice"),
        ({"targets": "swapped", "streams": ("a",)}, "needs two streams"),
    ],
)
def test_config_refuses_what_cannot_work(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KMeansConfig(**options)
