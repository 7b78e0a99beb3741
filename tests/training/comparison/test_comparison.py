"""Paired differences against scipy, a literal bootstrap and cases with a known answer."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from training.comparison.answers import Answers, read_answers
from training.comparison.compare import Pairs, Truth, compare
from training.comparison.differences import Question, differences, holm
from training.errors import TrainingError
from training.evaluation.scores import mcnemar


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 9), (9, 3), (40, 41), (100, 160)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_holm_corrects_as_it_is_defined() -> None:
    found = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(found, [0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


def _right(n_clips: int, n_groups: int, seed: int = 0) -> tuple[Question, np.ndarray]:
    """Clips of a recording that are all alike: b is better on some recordings."""
    rng = np.random.default_rng(seed)
    groups = np.arange(n_clips) % n_groups
    a, b = rng.random(n_groups) < 0.5, rng.random(n_groups) < 0.6
    return Question(("all",), np.arange(n_clips), a[groups], b[groups]), groups


def test_interval_is_that_of_a_bootstrap_over_recordings() -> None:
    question, groups = _right(600, 60)
    [[found]] = differences([[question]], groups, resamples=4000)
    gain = question.b.astype(float) - question.a
    by_group = np.array([gain[groups == g].mean() for g in range(60)])
    peer = stats.bootstrap(
        (by_group,), np.mean, n_resamples=4000, method="percentile", random_state=1
    ).confidence_interval
    assert found.difference == pytest.approx(gain.mean())
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high), abs=0.015)
    # As if each clip were a recording of its own: ten times as many, three times as sure.
    [[alone]] = differences([[question]], np.arange(600), resamples=4000)
    assert (found.high - found.low) > 2.5 * (alone.high - alone.low)
    assert differences([[question]], groups, resamples=4000)[0][0] == found


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """95 % of intervals over repetitions, within three standard errors."""
    inside = []
    for seed in range(100):
        question, groups = _right(80, 80, seed)
        [[found]] = differences([[question]], groups, resamples=200)
        inside.append(found.low <= 0.1 <= found.high)
    assert 0.88 < np.mean(inside) <= 1


def test_one_recording_has_no_interval_and_no_clips_no_answer() -> None:
    groups = np.zeros(3, np.int64)
    right, wrong = np.ones(3, bool), np.zeros(3, bool)
    none = Question(("none",), np.zeros(0, np.int64), right[:0], wrong[:0])
    [[found]] = differences([[Question(("k",), np.arange(3), wrong, right), none]], groups)
    assert (found.difference, found.only_b, found.n_groups) == (1.0, 3, 1)
    assert np.isnan([found.low, found.high]).all()


_TRUTH = {f"c{i}": Truth(label, f"g{i}") for i, label in enumerate(["dog", "dog", "cat", "sea"])}


def _answers(name: str, *said: str, clips: str = "0123") -> Answers:
    return Answers(name, [f"c{i}" for i in clips], {"fusion": [tuple(s.split()) for s in said]})


def test_models_are_compared_on_the_clips_both_answered() -> None:
    a = _answers("a", "dog", "cat", "dog", "sea")
    b = _answers("b", "cat", "dog cat", "bird", clips="291")
    found = compare(a, _answers("b", "cat", "sea", "dog cat", clips="291"), _TRUTH, _PAIRS)
    assert b.clip_ids == ["c2", "c9", "c1"]
    assert (found.n_clips, found.only_a, found.only_b) == (2, ["c0", "c3"], ["c9"])
    whole = found.whole["fusion"]
    assert (whole.a, whole.b, whole.only_a, whole.only_b) == (0, 1, 0, 2)
    assert [d.name for d in found.classes["fusion"]] == [("cat",), ("dog",)]
    [pair] = found.pairs["fusion"]
    assert (pair.name, pair.a, pair.b) == (("cat", "dog"), 1.0, 0.0)
    assert compare(a, b, _TRUTH, _PAIRS).unknown == ["bird"]
    record = json.loads(json.dumps(found.as_json()), parse_constant=pytest.fail)
    assert record["streams"]["fusion"]["classes"][0]["low"] is None


_PAIRS = Pairs([("cat", "dog")], "training clips")


def test_models_without_a_clip_in_common_are_told_apart_by_what_they_have() -> None:
    a, b = _answers("a", "dog", clips="0"), _answers("b", "dog", clips="1")
    with pytest.raises(TrainingError, match="no clip in common: fusion of 1 clips such as c0"):
        compare(a, b, _TRUTH, _PAIRS)


def _write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_csv_of_another_project_names_classes_with_commas(tmp_path: Path) -> None:
    rows = 'video_id,a,av\nx.mp4,"child speech, kid speaking",dog\ny,,cat\n'
    found = read_answers(_write(tmp_path / "p.csv", rows))
    assert found.clip_ids == ["x", "y"]
    assert found.said["audio"] == [("child speech, kid speaking",), ()]
    assert found.said["fusion"] == [("dog",), ("cat",)]


def test_scores_are_read_by_the_names_of_their_places(tmp_path: Path) -> None:
    scores = {"x": {"logits": {"a": [0.1, 0.9], "v": [0.8, 0.2], "av": [1, 2]}}}
    in_order, otherwise = '0,"a, b"\n1,c\n', '1,c\n0,"a, b"\n'
    for listed in (f"index,display_name\n{in_order}", f"\ufeffindex,display_name\n{otherwise}"):
        names = _write(tmp_path / "names.csv", listed)
        found = read_answers(_write(tmp_path / "p.json", scores), names)
        assert {s: said[0] for s, said in found.said.items()} == {
            "audio": ("c",), "video": ("a, b",), "fusion": ("c",),
        }  # fmt: skip
    with pytest.raises(TrainingError, match=r"shape \(2,\), and 309 classes have names"):
        read_answers(str(tmp_path / "p.json"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "x", "found '.txt', can read .csv, .parquet, .json, .pkl"),
        ("p.csv", "clip,av\nx,dog\n", "columns clip, av; one of clip_id"),
        ("p.csv", "id,av\nx,dog\nx,cat\n", "a clip stands in it twice ('x')"),
        (
            "p.csv",
            "id,av\nx,child speech, kid\n",
            "line 2: 3 columns, expected 2 (id, av); a class",
        ),
        ("p.csv", "id,av\nx,dog\ny\n", "line 3: 1 columns, expected 2"),
        ("p.json", {"x": {"predictions": {"a": 3}}}, "x, a: predictions are 3; expected a list"),
        ("p.json", {"x": {"logits": {"a": [1, [2]]}}}, "cannot be read"),
        ("p.csv", "id,sound\nx,dog\n", "names no class in any of 1 clips"),
        ("p.json", "{", "cannot be read"),
        ("p.json", "[]", "expected {clip_id"),
        ("p.pkl", "cos\nsystem\n(S'id'\ntR.", "holds os.system; only arrays"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_was_found(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    with pytest.raises(TrainingError) as error:
        read_answers(_write(tmp_path / name, content))
    assert said in str(error.value)
