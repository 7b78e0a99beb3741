"""Rounds in one process: right, whole or not at all, and resumable."""

import contextlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from clustering import storage
from clustering.config import GuardConfig, KMeansConfig
from clustering.errors import BadVectors, ClusteringError
from clustering.kmeans.checkpoint import StateFile
from clustering.kmeans.label_table import LabelTable
from clustering.rounds.files import load_round
from clustering.rounds.given import Given
from clustering.rounds.health import agreement
from clustering.rounds.local import LocalRounds
from clustering.rounds.maker import RoundMaker
from clustering.rounds.protocol import RoundRequest
from clustering.rounds.targets import stream_slices

CONFIG = KMeansConfig(k=8, vshards=8)


def _run(rounds: LocalRounds, number: int = 1, **options):
    step = 100 * number
    request = {"posterior_temperature": 0.1, **options}
    rounds.start(RoundRequest(number, step, step + 20, **request))
    return rounds.wait(number, 60)


@pytest.mark.parametrize("targets", ["mean", "concat", "own", "swapped"])
@pytest.mark.parametrize("heads", [1, 2])
def test_every_target_finds_the_classes(
    features, push_all, streams, tmp_path: Path, targets: str, heads: int
) -> None:
    data = features()
    config = KMeansConfig(k=8, vshards=8, targets=targets, heads=heads)
    rounds = LocalRounds(config, streams, str(tmp_path))
    push_all(rounds, data, 100)
    made = _run(rounds, expected_rows=len(data.keys))
    assert made.ok
    assert len(made.heads) == heads * (2 if targets in ("own", "swapped") else 1)
    assert len({head.name for head in made.heads}) == len(made.heads)
    for head in made.heads:
        assert agreement(head.lookup(data.keys), data.truth)["nmi"] >= 0.95
    if heads == 2:
        assert not np.array_equal(made.heads[0].labels_N, made.heads[1].labels_N)


def test_prototypes_and_confusion_match_their_definition(
    features, push_all, streams, tmp_path: Path
) -> None:
    data = features(noise=1.0)
    rounds = LocalRounds(KMeansConfig(k=8, targets="own"), streams, str(tmp_path))
    push_all(rounds, data, 100)
    for head in _run(rounds, posterior_temperature=0.2).heads:
        labels = head.lookup(data.keys)
        mean_posterior = np.zeros((8, 8))
        for name, (start, stop) in stream_slices(streams).items():
            h = data.rows[:, start:stop].astype(np.float64)
            h /= np.linalg.norm(h, axis=1, keepdims=True)
            prototypes = np.stack([h[labels == c].sum(axis=0) for c in range(8)])
            prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
            np.testing.assert_allclose(head.prototypes[name], prototypes, atol=1e-6)
            if name in head.teaches:
                odds = np.exp(h @ prototypes.T / 0.2)
                posterior = odds / odds.sum(axis=1, keepdims=True)
                for c in range(8):
                    mean_posterior[c] += posterior[labels == c].mean(axis=0) / len(head.teaches)
        np.testing.assert_allclose(head.confusion_KK, mean_posterior, atol=1e-5)
        np.testing.assert_allclose(head.confusion_KK.sum(axis=1), 1, atol=1e-6)


def test_an_empty_cluster_has_zero_prototypes_and_confuses_nobody(
    push_all, features, streams, tmp_path: Path
) -> None:
    data = features(n=40)
    same = data._replace(rows=np.repeat(data.rows[:1], 40, axis=0))
    config = KMeansConfig(
        k=3, guard=GuardConfig(min_effective_frac=0, max_mean_cosine=1, max_churn=1)
    )
    rounds = LocalRounds(config, streams, str(tmp_path))
    push_all(rounds, same, 100)
    made = _run(rounds)
    assert made.health["n_empty"] == 2
    [head] = made.heads
    used = head.labels_N[0]
    for empty in {0, 1, 2} - {used}:
        assert not head.prototypes["audio"][empty].any()
        assert head.confusion_KK[empty].tolist() == np.eye(3)[empty].tolist()


def test_ids_stay_stable_from_round_to_round(features, push_all, streams, tmp_path: Path) -> None:
    rounds = LocalRounds(CONFIG, streams, str(tmp_path))
    data = features(noise=1.0)
    push_all(rounds, data, 100)
    first = _run(rounds)
    moved = features(noise=1.0, drift=1)
    push_all(rounds, moved, 200)
    second = _run(rounds, 2)
    same = first.heads[0].lookup(data.keys) == second.heads[0].lookup(data.keys)
    assert same.mean() >= 0.9
    assert 0 < second.health["churn"] < 0.2


def test_a_cold_round_starts_anew(features, push_all, streams, tmp_path: Path) -> None:
    rounds = LocalRounds(CONFIG, streams, str(tmp_path))
    data = features(noise=1.0)
    push_all(rounds, data, 100)
    first = _run(rounds)
    cold = _run(rounds, 2, cold=True)
    assert (first.heads[0].labels_N == cold.heads[0].labels_N).mean() < 0.5
    assert cold.health["churn"] < 0.3


def test_a_published_round_can_be_read_again(
    features, push_all, streams, round_digest, tmp_path: Path
) -> None:
    rounds = LocalRounds(CONFIG, streams, str(tmp_path))
    push_all(rounds, features(), 100)
    made = _run(rounds)
    loaded = load_round(str(tmp_path), 1)
    assert round_digest(loaded) == round_digest(made)
    assert loaded.health == made.health
    with pytest.raises(
        ClusteringError, match=r"round 3 was never completed.*Completed rounds: \[1\]"
    ):
        load_round(str(tmp_path), 3)


def test_collapsed_features_publish_nothing_and_the_round_before_stays(
    features, push_all, streams, tmp_path: Path
) -> None:
    rounds = LocalRounds(CONFIG, streams, str(tmp_path))
    data = features()
    push_all(rounds, data, 100)
    assert _run(rounds).ok
    collapsed = data.rows * np.float16(0.05) + data.rows[:1]
    push_all(rounds, data._replace(rows=collapsed), 200)
    withheld = _run(rounds, 2)
    assert not withheld.ok
    assert "mean cosine" in withheld.reason
    assert withheld.heads == []
    assert load_round(str(tmp_path), 2).reason == withheld.reason
    push_all(rounds, data, 300)
    third = _run(rounds, 3)
    assert third.ok
    assert third.health["churn"] < 0.05  # against round 1


def test_low_coverage_withholds_the_round(features, push_all, streams, tmp_path: Path) -> None:
    rounds = LocalRounds(CONFIG, streams, str(tmp_path))
    push_all(rounds, features(), 100)
    made = _run(rounds, expected_rows=10_000)
    assert not made.ok
    assert made.health["coverage"] == pytest.approx(0.15)
    assert "coverage 0.150" in made.reason


def test_a_round_with_a_missing_label_is_never_published(
    features, push_all, streams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clustering.kmeans.share import Share

    label = Share.label

    def lossy(self, *args):
        return tuple(column[1:] for column in label(self, *args))

    monkeypatch.setattr(Share, "label", lossy)
    rounds = LocalRounds(CONFIG, streams, str(tmp_path))
    push_all(rounds, features(), 100)
    made = _run(rounds)
    assert not made.ok
    assert made.heads == []
    assert made.reason.startswith("missing labels: 1499 distinct keys were labelled of 1500 rows")
    assert not storage.exists(str(tmp_path / "round-0001" / "labels.parquet"))


def test_a_round_killed_in_any_iteration_resumes_with_the_same_bits(
    features, push_all, streams, round_digest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = KMeansConfig(k=8, vshards=8, tol=0, targets="own", init="random")
    data = features(noise=2.0)
    undisturbed = LocalRounds(config, streams, str(tmp_path / "undisturbed"))
    push_all(undisturbed, data, 100)
    expected = round_digest(_run(undisturbed))
    save = StateFile.save
    for fatal in (1, 4, 9):
        saves = iter(range(1, 10**6))

        def dying(self, arrays, saves=saves, fatal=fatal):
            save(self, arrays)
            if next(saves) == fatal:
                raise KeyboardInterrupt

        folder = str(tmp_path / f"killed-{fatal}")
        killed = LocalRounds(config, streams, folder)
        push_all(killed, data, 100, seed=fatal)
        with monkeypatch.context() as patch:
            patch.setattr(StateFile, "save", dying)
            with pytest.raises(KeyboardInterrupt):
                _run(killed)
        assert round_digest(LocalRounds(config, streams, folder).wait(1, 60)) == expected
        restarted = LocalRounds(config, streams, folder)
        assert round_digest(_run(restarted)) == expected


def test_the_same_request_by_another_config_makes_the_round_again(
    features, push_all, streams, tmp_path: Path
) -> None:
    data = features()
    for k in (8, 6):
        rounds = LocalRounds(KMeansConfig(k=k), streams, str(tmp_path))
        push_all(rounds, data, 100)
        assert len(_run(rounds).heads[0].prototypes["audio"]) == k


def test_saved_bank_gives_the_same_round(
    features, push_all, streams, round_digest, tmp_path: Path
) -> None:
    rounds = LocalRounds(CONFIG, streams, str(tmp_path / "a"))
    push_all(rounds, features(), 100)
    rounds.save(str(tmp_path / "a" / "bank-1"))
    other = LocalRounds(CONFIG, streams, str(tmp_path / "b"))
    push_all(other, features(seed=9), 50)
    other.restore(str(tmp_path / "a" / "bank-1"))
    assert other.stats().rows == 1500
    assert round_digest(_run(rounds)) == round_digest(_run(other))


def test_pushes_after_the_start_do_not_change_the_round(
    features, push_all, streams, round_digest, tmp_path: Path
) -> None:
    digests = []
    for name in ("a", "b"):
        rounds = LocalRounds(CONFIG, streams, str(tmp_path / name))
        push_all(rounds, features(), 100)
        if name == "b":
            push_all(rounds, features(drift=3), 101)
        rounds.start(RoundRequest(1, 100, 120, posterior_temperature=0.1))
        push_all(rounds, features(drift=4), 102)
        digests.append(round_digest(rounds.wait(1, 60)))
    assert digests[0] == digests[1]


def test_old_vectors_go_and_labels_stay(features, push_all, streams, tmp_path: Path) -> None:
    rounds = LocalRounds(KMeansConfig(k=8), streams, str(tmp_path), keep_vectors=1)
    push_all(rounds, features(), 100)
    for number in (1, 2, 3):
        _run(rounds, number)
    kept = [storage.names(str(tmp_path / f"round-000{r}")) for r in (1, 2, 3)]
    assert ["vectors" in names for names in kept] == [False, False, True]
    assert all("labels.parquet" in names and "state" not in names for names in kept)


def test_a_round_of_too_few_clips_is_an_error(features, push_all, streams, tmp_path: Path) -> None:
    rounds = LocalRounds(CONFIG, streams, str(tmp_path))
    push_all(rounds, features(n=7), 100)
    with pytest.raises(BadVectors, match="7 rows for k = 8 clusters"):
        _run(rounds)


def test_rows_lost_before_their_freeze_can_be_pushed_again(
    features, push_all, streams, round_digest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver died between asking for a round and its freeze; its bank was not saved."""
    undisturbed = LocalRounds(CONFIG, streams, str(tmp_path / "undisturbed"))
    push_all(undisturbed, features(), 100)
    expected = round_digest(_run(undisturbed))
    killed = LocalRounds(CONFIG, streams, str(tmp_path / "killed"))
    push_all(killed, features(), 100)
    with monkeypatch.context() as patch:
        patch.setattr("clustering.rounds.local.write_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _run(killed)
    resumed = LocalRounds(CONFIG, streams, str(tmp_path / "killed"))
    with pytest.raises(ClusteringError, match="no rows to cluster, the feature bank is empty"):
        _run(resumed)
    push_all(resumed, features(), 100)
    assert round_digest(_run(resumed)) == expected


@pytest.mark.parametrize("done", ["frozen", "published"])
def test_a_bank_of_before_its_round_keeps_no_old_rows_once_the_round_goes_on(
    done: str, features, push_all, streams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved says that a freeze is to come, for which each version of a row would stay."""
    data = features()
    killed = LocalRounds(CONFIG, streams, str(tmp_path))
    push_all(killed, data, 100)
    with monkeypatch.context() as patch:
        patch.setattr(LocalRounds, "_make", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _run(killed)
    push_all(killed, data, 110)
    killed.save(str(tmp_path / "bank-110"))
    assert _saved_rows(tmp_path / "bank-110") == 2 * len(data.keys), "no freeze is to come"
    with monkeypatch.context() as patch, contextlib.suppress(ZeroDivisionError):
        if done == "frozen":
            patch.setattr(RoundMaker, "make", lambda *_: 1 / 0)
        _run(killed)
    resumed = LocalRounds(CONFIG, streams, str(tmp_path))
    resumed.restore(str(tmp_path / "bank-110"))
    _run(resumed)
    resumed.save(str(tmp_path / "bank-120"))
    assert _saved_rows(tmp_path / "bank-120") == len(data.keys)


def _saved_rows(saved: Path) -> int:
    return int(pq.read_metadata(saved / "rows.parquet").num_rows)


def test_given_labels_are_published_with_prototypes_and_confusion_of_their_own(
    features, push_all, streams, round_digest, tmp_path: Path
) -> None:
    data = features(noise=1.0)
    given = Given(LabelTable(data.keys[:-5], (data.truth[:-5] % 8).astype(np.int32)))
    rounds = LocalRounds(CONFIG, streams, str(tmp_path / "given"), given=given)
    push_all(rounds, data, 100)
    made = _run(rounds, posterior_temperature=0.2)
    [head] = made.heads
    np.testing.assert_array_equal(head.lookup(data.keys[:-5]), given.table.labels_N)
    assert (head.lookup(data.keys[-5:]) == -100).all(), "rows without a label got one"
    start, stop = stream_slices(streams)["audio"]
    h = data.rows[:-5, start:stop].astype(np.float64)
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    prototypes = np.stack([h[given.table.labels_N == c].sum(axis=0) for c in range(8)])
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    np.testing.assert_allclose(head.prototypes["audio"], prototypes, atol=1e-6)
    np.testing.assert_allclose(head.confusion_KK.sum(axis=1), 1, atol=1e-6)
    assert round_digest(load_round(str(tmp_path / "given"), 1)) == round_digest(made)


def test_labels_of_a_clustering_given_again_are_the_same_round(
    features, push_all, streams, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"iterations": 200, "tol": 0.0})
    clustered = LocalRounds(config, streams, str(tmp_path / "clustered"))
    data = features(noise=1.0)
    push_all(clustered, data, 100)
    found = _run(clustered)
    given = Given(found.heads[0].table)
    again = LocalRounds(config, streams, str(tmp_path / "given"), given=given)
    push_all(again, data, 100)
    made = _run(again)
    for stream, prototypes_KP in found.heads[0].prototypes.items():
        np.testing.assert_array_equal(made.heads[0].prototypes[stream], prototypes_KP)
    np.testing.assert_array_equal(made.heads[0].confusion_KK, found.heads[0].confusion_KK)
    for name in ("inertia", "effective_clusters", "mean_cosine", "size_min", "size_max"):
        assert made.health[name] == pytest.approx(found.health[name], rel=1e-6), name


def test_given_labels_are_measured_on_all_rows_whatever_a_fit_would_see(
    features, push_all, streams, tmp_path: Path
) -> None:
    data = features(noise=1.0)
    given = Given(LabelTable(data.keys[:-500], (data.truth[:-500] % 8).astype(np.int32)))
    found = []
    for sample in (None, 10):
        config = CONFIG.model_copy(update={"max_points_per_centroid": sample})
        rounds = LocalRounds(config, streams, str(tmp_path / f"of-{sample}"), given=given)
        push_all(rounds, data, 100)
        health = _run(rounds).health
        found.append({name: health[name] for name in ("inertia", "mean_cosine")})
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_labels_outside_k_are_refused(streams, tmp_path: Path) -> None:
    given = Given(LabelTable(np.arange(3, dtype=np.uint64), np.array([0, 8, 1], np.int32)))
    with pytest.raises(ClusteringError, match="found 8, allowed are 0 to 7"):
        LocalRounds(CONFIG, streams, str(tmp_path), given=given)
