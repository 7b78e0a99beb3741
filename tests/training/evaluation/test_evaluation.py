"""Metrics, probes and retrieval against scikit-learn, loops and cases with a known answer."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, top_k_accuracy_score
from sklearn.preprocessing import StandardScaler

from training.evaluation.probes import few_label_probe, knn_probe, linear_probe
from training.evaluation.retrieval import class_retrieval, retrieval, subset_per_class
from training.evaluation.scores import (
    average_precisions,
    class_accuracies,
    confusion_counts,
    mean_average_precision,
    most_confused_pairs,
    pair_accuracy,
    taken_as,
    topk_accuracy,
)


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    return rng.normal(size=(200, 7)), rng.integers(0, 7, 200)


@pytest.fixture
def clusters():
    """Features of 4 classes around their centres, 300 to train on and 100 to test on."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(4, 12))
    labels = rng.integers(0, 4, 400)
    features = (centres[labels] + 0.8 * rng.normal(size=(400, 12))).astype(np.float32)
    return features[:300], labels[:300], features[300:], labels[300:]


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_topk_equals_scikit_learn(scored, k):
    scores, labels = scored
    expected = 1.0 if k >= 7 else top_k_accuracy_score(labels, scores, k=k)
    assert topk_accuracy(scores, labels, k) == pytest.approx(expected)


def test_equal_scores_are_right_for_one_class_only():
    assert topk_accuracy(np.zeros((4, 4)), np.arange(4)) == 0.25


@pytest.mark.parametrize("decimals", [8, 1], ids=["distinct", "tied"])
def test_average_precision_equals_scikit_learn(scored, decimals):
    scores, labels = scored[0].round(decimals), scored[1]
    expected = [average_precision_score(labels == c, scores[:, c]) for c in range(7)]
    np.testing.assert_allclose(average_precisions(scores, labels), expected, rtol=1e-12)
    assert mean_average_precision(scores, labels) == pytest.approx(np.mean(expected))


def test_clips_of_several_classes_count_for_each_of_them(scored):
    scores, labels = scored
    several = np.stack([labels, np.where(np.arange(len(labels)) % 3, -1, (labels + 2) % 7)], 1)
    hot = np.zeros(scores.shape, bool)
    for column in several.T:
        hot[np.flatnonzero(column >= 0), column[column >= 0]] = True
    expected = average_precision_score(hot, scores, average=None)
    np.testing.assert_allclose(average_precisions(scores, several), expected, rtol=1e-12)
    best = scores.argmax(1)
    assert topk_accuracy(scores, several) == hot[np.arange(len(best)), best].mean()
    assert topk_accuracy(scores, several) > topk_accuracy(scores, labels)
    assert topk_accuracy(scores, several[:, :1], 3) == topk_accuracy(scores, labels, 3)
    confusion = confusion_counts(taken_as(several, best), best, 7)
    assert confusion.trace() == hot[np.arange(len(best)), best].sum()
    assert confusion.sum() == len(best)


def test_classes_without_clips_do_not_count():
    scores, labels = np.eye(3)[[0, 0, 2]], np.array([0, 0, 2])
    assert np.isnan(average_precisions(scores, labels)[1])
    assert mean_average_precision(scores, labels) == 1
    confusion = confusion_counts(labels, np.array([0, 2, 2]), 3)
    np.testing.assert_array_equal(confusion, [[1, 0, 1], [0, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(class_accuracies(confusion), [0.5, np.nan, 1])


def test_most_confused_pairs_come_first_and_weigh_rates_not_counts():
    confusion = np.array([[90, 10, 0], [0, 4, 6], [0, 0, 10]])
    first, second = most_confused_pairs(confusion, 5)
    assert (first.first, first.second) == (1, 2)
    assert first.degree == pytest.approx(0.3)
    assert (second.first, second.second, second.degree) == (0, 1, pytest.approx(0.05))


def test_pair_accuracy_compares_the_two_classes_only():
    scores = np.array([[1.0, 0.5, 9.0], [0.2, 0.5, 9.0], [0.7, 0.6, 0.0], [0.4, 0.4, 0.0]])
    labels = np.array([0, 1, 1, 0])
    assert pair_accuracy(scores, labels, [(0, 1)]) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    with pytest.raises(ValueError, match="no clips of the pair 2, 2"):
        pair_accuracy(scores, labels, [(2, 2)])
    with pytest.raises(ValueError, match="at least one pair"):
        pair_accuracy(scores, labels, [])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), "need"),
        (np.full((2, 3), np.nan), np.zeros(2, int), "2 of 2 clips are not finite"),
        (np.zeros((2, 3)), np.array([0, 3]), r"labels 0\.\.3 for 3 classes"),
    ],
)
def test_bad_scores_are_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        topk_accuracy(scores, labels)
    with pytest.raises(ValueError, match=message):
        mean_average_precision(scores, labels)


@pytest.mark.parametrize("rows", [4096, 64], ids=["whole", "in pieces"])
def test_linear_probe_equals_scikit_learn(clusters, rows, monkeypatch):
    monkeypatch.setattr("training.evaluation.probes._ROWS", rows)
    train, labels, test, truth = clusters
    scaler = StandardScaler().fit(train)
    peer = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(scaler.transform(train), labels)
    found = linear_probe(train, labels, test, 4)
    np.testing.assert_allclose(found, peer.predict_proba(scaler.transform(test)), atol=2e-3)
    assert topk_accuracy(found, truth) > 0.8


def test_linear_probe_ignores_constant_features_and_empty_classes(clusters):
    train, labels, test, _ = clusters
    constant = [np.hstack([x, np.full((len(x), 1), 7, np.float32)]) for x in (train, test)]
    found = linear_probe(constant[0], labels, constant[1], 6)
    np.testing.assert_allclose(found[:, :4], linear_probe(train, labels, test, 6)[:, :4], atol=1e-3)
    assert found[:, 4:].max() < 0.05


def test_few_labels_are_as_many_of_each_class_and_the_same_in_every_run():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], (40, 30, 4))
    train = rng.normal(size=(len(labels), 6)) + np.eye(6)[labels] * 4
    test = rng.normal(size=(9, 6))
    found = few_label_probe(train, labels, test, 3, per_class=5)
    np.testing.assert_array_equal(found, few_label_probe(train, labels, test, 3, per_class=5))
    every = few_label_probe(train, labels, test, 3, per_class=40)
    np.testing.assert_array_equal(every, linear_probe(train, labels, test, 3))
    assert not np.allclose(found, every)


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_probes_copy_neither_features_nor_logits(probe):
    """Both are gigabytes for 200,000 clips."""
    n, width, n_classes = 50_000, 512, 300
    features = np.ones((n, width), np.float32)
    features[:, ::2] += np.arange(n, dtype=np.float32)[:, None] / n
    labels = np.arange(n) % n_classes
    few = {"iterations": 1} if probe is linear_probe else {"k": 5}
    probe(features[:400], labels[:400], features[:8], n_classes, **few)  # What torch loads.
    grown, stop = [0], threading.Event()
    before = _own_bytes()

    def watch():
        while not stop.wait(0.002):
            grown.append(_own_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    probe(features, labels, features[:8], n_classes, **few)
    stop.set()
    watcher.join()
    assert max(grown) < features.nbytes, f"{max(grown) / 1e6:.0f} MB"


def _own_bytes():
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon")) * 1024


@pytest.mark.parametrize("rows", [256, 7])
def test_knn_probe_equals_its_definition(clusters, rows):
    train, labels, test, _ = clusters
    found = knn_probe(train, labels, test, 4, k=5, temperature=0.1, rows=rows)
    for i in (0, 50, 99):
        cosines = [t @ test[i] / np.linalg.norm(t) / np.linalg.norm(test[i]) for t in train]
        votes = np.zeros(4)
        for j in np.argsort(cosines)[-5:]:
            votes[labels[j]] += np.exp(cosines[j] / 0.1)
        np.testing.assert_allclose(found[i], votes / votes.sum(), atol=1e-5)


def test_knn_probe_takes_every_clip_when_there_are_fewer_than_k(clusters):
    train, labels, test, _ = clusters
    found = knn_probe(train[:3], labels[:3], test, 4, k=20)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


def test_a_training_clip_has_no_vote_on_itself(clusters):
    train, labels, _, _ = clusters
    own = np.array([7, 60, 200])
    found = knn_probe(train, labels, train[own], 4, k=5, rows=2, own_M=own)
    for i, row in enumerate(own):
        others = np.delete(np.arange(300), row)
        expected = knn_probe(train[others], labels[others], train[[row]], 4, k=5)
        np.testing.assert_allclose(found[i], expected[0], atol=1e-5)


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_probes_refuse_bad_features(probe, clusters):
    train, labels, test, _ = clusters
    with pytest.raises(ValueError, match="test features"):
        probe(train, labels, test[:, :3], 4)
    with pytest.raises(ValueError, match=r"labels 0\.\.3 for 3 classes"):
        probe(train, labels, test, 3)
    with pytest.raises(ValueError, match="not finite"):
        probe(train, labels, test * np.nan, 4)


def test_retrieval_equals_its_definition():
    rng = np.random.default_rng(2)
    audio = rng.normal(size=(60, 8))
    video = audio + rng.normal(size=(60, 8))
    found = retrieval(audio, video)
    a, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (audio, video))
    for name, queries, gallery in (("a2v", a, v), ("v2a", v, a)):
        cosines = [[float(q @ g) for g in gallery] for q in queries]
        ranks = [sum(c > row[i] for c in row) for i, row in enumerate(cosines)]
        for k in (1, 5, 10):
            assert found[f"{name}_r{k}"] == pytest.approx(np.mean(np.array(ranks) < k))
        assert found[f"{name}_median_rank"] == np.median(ranks) + 1


def test_collapsed_embeddings_retrieve_nothing():
    same = np.tile(np.random.default_rng(3).normal(size=(1, 64)), (300, 1))
    found = retrieval(same, same)
    assert found["a2v_r10"] == 0
    assert found["a2v_median_rank"] == 300
    classes = class_retrieval(same, same, np.arange(300) % 10)
    assert classes["a2v_class_r1"] == 0


def test_a_linear_probe_that_was_stopped_early_says_how_far_it_came(clusters, caplog):
    train, labels, test, _ = clusters
    linear_probe(train, labels, test, 4)
    assert not caplog.records
    linear_probe(train, labels, test, 4, iterations=3)
    [record] = caplog.records
    assert re.search(
        r"300 x 12 features and 4 classes: stopped after \d+ iterations and 3 eval", record.message
    )
    left = float(re.search(r"gradient is (\S+) of", record.message)[1])
    assert 1e-4 < left < 1


@pytest.mark.parametrize("decimals", [8, 0], ids=["distinct", "tied"])
def test_class_retrieval_equals_its_definition(decimals):
    """Of equal cosines those of other classes come first."""
    rng = np.random.default_rng(4)
    labels = np.array([0] * 10 + [1] * 10 + [2])
    audio, video = (rng.normal(size=(2, 21, 4)) + np.eye(3, 4)[labels]).round(decimals) + 0.5
    found = class_retrieval(audio, video, labels)
    first, precision, n_ties = [], [], 0
    for i in range(20):
        cosines = video @ audio[i] / np.linalg.norm(video, axis=1) / np.linalg.norm(audio[i])
        same = labels == labels[i]
        order = sorted((-cosines[j].round(6), same[j]) for j in range(21) if j != i)
        n_ties += len(order) - len({cosine for cosine, _ in order})
        hits = [hit for _, hit in order]
        first.append(hits[0])
        places = [sum(hits[: p + 1]) / (p + 1) for p, hit in enumerate(hits) if hit]
        precision.append(np.mean(places))
    assert (n_ties > 0) == (decimals == 0)
    assert found["a2v_class_r1"] == pytest.approx(np.mean(first), abs=1e-12)
    assert found["a2v_class_map"] == pytest.approx(np.mean(precision), abs=1e-12)


def test_retrieval_subset_depends_on_ids_not_on_row_order():
    labels = np.repeat(np.arange(5), [3, 5, 9, 20, 1])
    ids = np.array([f"clip{i:03d}" for i in range(len(labels))])
    rows = subset_per_class(ids.tolist(), labels, 5)
    assert np.bincount(labels[rows]).tolist() == [3, 5, 5, 5, 1]
    order = np.random.default_rng(5).permutation(len(ids))
    again = subset_per_class(ids[order].tolist(), labels[order], 5)
    assert set(ids[order][again]) == set(ids[rows])


def test_bad_embeddings_are_refused():
    good = np.eye(4)
    with pytest.raises(ValueError, match="need the same"):
        retrieval(good, good[:3])
    with pytest.raises(ValueError, match="not finite"):
        retrieval(good, good * np.nan)
    with pytest.raises(ValueError, match="a class with two clips"):
        class_retrieval(good, good, np.arange(4))
    with pytest.raises(ValueError, match="3 clip ids for 4 labels"):
        subset_per_class(["a", "b", "c"], np.arange(4))
