"""The pure parts of a report: thinning, orders, pairs and the choice of examples."""

import numpy as np
import pyarrow as pa
import pytest

from clustering.rounds.protocol import HeadLabels, PublishedRound
from training.evaluation.scores import confusion_rates, most_confused_pairs
from training.report.agreement import truths_of, with_agreement
from training.report.confusions import group_classes, worst_pairs
from training.report.curves import (
    Column,
    columns_of,
    panels,
    phase_seconds,
    step_seconds,
    thin,
    unchanging,
)
from training.report.examples import cluster_examples, pair_examples, retrieval_examples
from training.report.markup import duration, number, percent


def test_thinning_keeps_the_spike_the_ends_and_the_order() -> None:
    points = [(step, 1.0) for step in range(0, 100_000, 10)]
    points[4321] = (43210, 99.0)
    points[7000] = (70000, -5.0)
    kept = thin(_column(points), most=400)
    assert len(kept) <= 402
    assert {(43210, 99.0), (70000, -5.0), points[0], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert thin(_column(points[:50])) == points[:50]


def _column(points: list[tuple[int, float]]) -> Column:
    return Column(np.array([s for s, _ in points]), np.array([v for _, v in points]))


def test_every_metric_has_one_panel_and_what_is_not_finite_no_point() -> None:
    metrics = [
        {"step": 1, "time": 0, "epoch": 0.1, "loss": 2.0, "lr": 0.1, "finetune/loss": 3.0},
        {"step": 2, "time": 1, "epoch": 0.2, "loss": None, "lr": float("nan"), "odd_one": 1.0},
        {"step": 3, "time": 2, "loss": 1.0, "time/forward": 0.5, "clustering/nmi": 0.4},
    ]
    found = {panel.title: panel.series for panel in panels(columns_of(metrics))}
    assert [title for title in found] == ["Loss", "Learning rate", "Finetune", "Odd one"]
    assert found["Loss"][0].points == [(1, 2.0), (3, 1.0)]
    assert found["Learning rate"][0].points == [(1, 0.1)]


def test_a_metric_that_never_changed_is_named_instead_of_drawn() -> None:
    metrics = [{"step": k, "world_size": 2, "attempt": 1 + (k > 3), "lr": 0.1} for k in range(6)]
    metrics[0] |= {"only_once": 3.0, "time/forward": 1.0}
    columns = columns_of(metrics)
    assert [panel.title for panel in panels(columns)] == ["Attempt", "Only once"]
    assert unchanging(columns) == [("world_size", 2.0), ("lr", 0.1)]


def test_seconds_of_a_step_are_a_mean_over_the_lines_that_have_them() -> None:
    metrics = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "time/forward": 0.1, "time/stall": 0.4, "time/checkpoint": 0.2},
        {"step": 3, "time/forward": 0.3},
    ]
    shares = {share.name: share.seconds for share in step_seconds(columns_of(metrics))}
    assert shares == pytest.approx({"forward": 0.2, "stall": 0.2, "checkpoint": 0.1})
    assert [s.name for s in phase_seconds({"seconds": {"ingest": 3, "cluster": 2, "x": 0}})] == [
        "ingest"
    ]
    assert phase_seconds({}) == []


def test_confused_classes_stand_together_in_one_group() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.permutation(12)  # groups of three, scattered over the class indices
    counts = np.diag(np.full(12, 60))
    for at in range(12):
        start = at // 3 * 3
        for mate in hidden[start : start + 3]:
            counts[hidden[at], mate] += 20
    order = group_classes(counts)
    assert sorted(order.positions) == list(range(12))
    assert order.boundaries == [3, 6, 9]
    group_of = {int(c): at // 3 for at, c in enumerate(hidden)}
    for start in (0, 3, 6, 9):
        assert len({group_of[c] for c in order.positions[start : start + 3]}) == 1


@pytest.mark.parametrize("n_classes", [1, 2, 3])
def test_few_classes_and_classes_without_clips_are_ordered_too(n_classes: int) -> None:
    counts = np.zeros((n_classes, n_classes), np.int64)
    assert sorted(group_classes(counts).positions) == list(range(n_classes))
    assert worst_pairs(counts, 6) == []
    assert np.isnan(confusion_rates(counts)).all()


def test_worst_pair_is_by_rate_and_counts_both_ways_once() -> None:
    counts = np.array([[90, 10, 0], [0, 100, 0], [3, 0, 7]])
    first, second = worst_pairs(counts, 6)
    assert (first.a, first.b, first.b_as_a, first.n_b) == (0, 2, 3, 10)
    assert first.rate == pytest.approx((0 / 100 + 3 / 10) / 2)
    assert (second.a, second.b, second.a_as_b, second.b_as_a) == (0, 1, 10, 0)
    assert second.rate == pytest.approx((10 / 100 + 0 / 100) / 2)
    ranked = most_confused_pairs(counts, 2)
    assert [first.rate, second.rate] == [pair.degree for pair in ranked]


def _predictions(labels: list[int], predicted: list[int], sure: list[float]) -> pa.Table:
    ids = [f"clip{i}" for i in range(len(labels))]
    columns = {"clip_id": ids, "label": labels, "pred_fusion": predicted}
    return pa.table({**columns, "p_fusion": pa.array(sure, pa.float32())})


def test_confused_clips_come_first_and_a_right_one_keeps_a_place() -> None:
    table = _predictions(
        [0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 2, 1], [0.5, 0.9, 0.8, 0.6, 0.7, 0.99, 0.9]
    )
    counts = np.array([[1, 4, 1], [0, 1, 0], [0, 0, 0]])
    (pair, *_) = worst_pairs(counts, 6)
    of_a, of_b = pair_examples(table, ["cat", "dog", "owl"], pair)
    assert [e.clip_id for e in of_a] == ["clip1", "clip2", "clip3", "clip4"]
    assert [e.mark for e in of_a] == ["wrong", "wrong", "wrong", "right"]
    assert of_a[0].about == "taken for dog"
    assert [e.clip_id for e in of_b] == ["clip6"]


def test_clusters_are_the_largest_with_their_majority_and_strangers_marked() -> None:
    keys = np.arange(10, dtype=np.uint64)
    labels = np.array([5, 5, 5, 5, 2, 2, 2, -100, -100, 7], np.int32)
    clip_of = {k: (f"clip{k}", "cat" if k < 3 else "dog") for k in range(9)}
    clusters, n_clusters = cluster_examples(keys, labels, clip_of, most=2)
    assert n_clusters == 3
    assert [(c.label, c.size, c.majority, c.purity) for c in clusters] == [
        (5, 4, "cat", 0.75),
        (2, 3, "dog", 1.0),
    ]
    assert [e.mark for e in clusters[0].examples] == ["", "", "", "wrong"]


def test_clips_the_store_does_not_know_or_that_have_no_label_are_no_error() -> None:
    keys, labels = np.arange(4, dtype=np.uint64), np.zeros(4, np.int32)
    (cluster,), _ = cluster_examples(keys, labels, {})
    assert cluster.size == 4
    assert cluster.examples == []
    (cluster,), _ = cluster_examples(keys, labels, {0: ("clip0", "")})
    assert cluster.majority == ""
    assert np.isnan(cluster.purity)


def test_agreement_of_a_round_counts_clips_with_both_labels() -> None:
    keys = np.arange(8, dtype=np.uint64)
    labels = np.array([0, 0, 1, 1, -100, 0, 1, 1], np.int32)
    clip_of = {k: (f"clip{k}", "cat" if k in (0, 1, 4, 5) else "dog") for k in range(7)}
    clip_of[6] = ("clip6", "")

    def published(labels_N: np.ndarray) -> PublishedRound:
        head = HeadLabels("head0", ("audio",), keys, labels_N, {}, np.eye(2, dtype=np.float32))
        return PublishedRound(1, 5, True, "", [head], {"churn": 0.1})

    done = published(labels)
    found = with_agreement(done, truths_of(clip_of)).health
    perfect = {"churn": 0.1, "nmi": 1.0, "purity": 1.0, "hungarian_accuracy": 1.0}
    assert found == pytest.approx(perfect)
    wrong = published(np.array([0, 1, 0, 1, 0, 1, 0, 1], np.int32))
    assert with_agreement(wrong, truths_of(clip_of)).health["nmi"] < 0.2
    assert with_agreement(done, truths_of({})) is done


def test_retrieval_shows_the_first_clip_of_each_class_and_its_true_rank() -> None:
    ids = ["b1", "a1", "a2", "b2"]
    label_of = {"a1": "cat", "a2": "cat", "b1": "dog", "b2": "dog"}
    audio = np.array([[1, 0], [0, 1], [0, 1], [1, 0]], np.float32)
    video = np.array([[0, 1], [0.1, 0.9], [0, 1], [1, 0]], np.float32)
    cat, dog = retrieval_examples(ids, audio, video, label_of, each=3)
    assert (cat.query.clip_id, dog.query.clip_id) == ("a1", "b1")
    assert [e.clip_id for e in cat.found] == ["b1", "a2", "a1"]
    assert [e.mark for e in cat.found] == ["wrong", "same", "right"]
    assert (cat.rank, dog.rank) == (3, 3)
    again = retrieval_examples(ids, audio, video, label_of, each=3)
    assert again == [cat, dog]
    assert retrieval_examples([], audio[:0], video[:0], {}) == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (percent(0.91254), "91.3\N{NO-BREAK SPACE}%"),
        (percent(None), "–"),
        (percent(float("nan")), "–"),
        (number(1234567), "1\u2009234\u2009567"),
        (number(0.123456), "0.1235"),
        (number("<b>"), "&lt;b&gt;"),
        (duration(0.0123), "12.3 ms"),
        (duration(59.94), "59.9 s"),
        (duration(200), "3 min 20 s"),
        (duration(7500), "2 h 5 min"),
    ],
)
def test_numbers_are_written_for_people(found: str, expected: str) -> None:
    assert found == expected
