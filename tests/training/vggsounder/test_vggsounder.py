"""VGGSounder's metrics against the package's own benchmark, and errors split by what is true."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from support.predicted import STREAMS, predictions
from vggsounder import VGGSounder, benchmark

from training.errors import TrainingError
from training.evaluation.predictions import Predictions
from training.vggsounder.exchange import write_pickle
from training.vggsounder.labels import TrueLabels, read_labels
from training.vggsounder.noise import split_errors
from training.vggsounder.scores import KS, SUBSETS, join, measure


@pytest.fixture(scope="module")
def labels() -> TrueLabels:
    return read_labels()


def _random(labels: TrueLabels, clip_ids: list[str]) -> Predictions:
    """Random scores of clips, over VGGSounder's classes in an order that is not VGGSounder's."""
    rng = np.random.default_rng(1)
    classes = rng.permutation(labels.classes).tolist()
    shape = (len(clip_ids), len(classes))
    scores = {stream: rng.random(shape, dtype=np.float32) for stream in STREAMS}
    position = {name: i for i, name in enumerate(classes)}
    rows = {clip_id: i for i, clip_id in enumerate(clip_ids)}
    own = rng.integers(0, len(classes), len(clip_ids))
    for clip, index in zip(labels.clip_R, labels.class_R, strict=True):
        row = rows.get(labels.clip_ids[clip])
        if row is not None and rng.random() < 0.5:
            scores[STREAMS[int(rng.integers(3))]][row, position[labels.classes[index]]] += 0.5
    return predictions(clip_ids, classes, own, scores)


def _package(tmp_path: Path, subset: str) -> dict[str, dict[str, float]]:
    """What the package makes of the pickle in a folder."""
    which = SUBSETS[subset]
    meta = {"background_music": None, **({which[0]: which[1]} if which else {})}
    found = benchmark.compute_all_results(
        str(tmp_path), vggsounder=VGGSounder(**meta), verbose=False
    )
    return found["mine"]


def _check(
    ours: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]], at_most: float = 1e-12
) -> None:
    for modality in ("a", "v", "av", "a only", "v only"):
        for k in KS:
            for name in (f"hit_rate@{k}", f"f1@{k}", f"jaccard@{k}"):
                difference = abs(ours[modality][name] - theirs[modality][name])
                assert difference < at_most, (modality, name)
    for stream, mu in ours["mu"].items():
        assert abs(mu - theirs[stream]["mu"]) < at_most, stream


@pytest.fixture
def compared_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package without what is not compared, which takes nine tenths of its time."""
    unused = ("roc_auc_score", "average_precision_score", "accuracy_score", "precision_score")
    for name in (*unused, "recall_score"):
        monkeypatch.setattr(benchmark, name, lambda *_, **__: 0.0)
    f1 = benchmark.f1_score

    def micro(*given: object, average: str, **options: object) -> float:
        return f1(*given, average=average, **options) if average == "micro" else 0.0

    monkeypatch.setattr(benchmark, "f1_score", micro)


@pytest.mark.slow
def test_metrics_are_the_packages_own_with_and_without_music(
    labels: TrueLabels, tmp_path: Path, compared_only: None
) -> None:
    # Some clips are missing, and some are none of VGGSounder's.
    some = [*labels.clip_ids[::50], *(f"notamong{i:03d}_000000" for i in range(40))]
    given = _random(labels, some)
    assert write_pickle(tmp_path / "mine.pkl", given)["n_clips"] == len(some)
    ours = measure(join(given, labels))
    theirs = {subset: _package(tmp_path, subset) for subset in ("all", "no_background_music")}
    for subset, found in theirs.items():
        _check(ours[subset], found)
    # The order of the run's own classes would have passed for VGGSounder's without a word.
    renamed = given._replace(about=given.about._replace(classes=labels.classes))
    wrong = measure(join(renamed, labels))
    with pytest.raises(AssertionError):
        _check(wrong["all"], theirs["all"], at_most=1e-3)


@pytest.mark.soak
def test_metrics_are_the_packages_own_on_its_whole_list_and_every_subset(
    labels: TrueLabels, tmp_path: Path, compared_only: None
) -> None:
    given = _random(labels, labels.clip_ids)
    write_pickle(tmp_path / "mine.pkl", given)
    ours = measure(join(given, labels))
    for subset in SUBSETS:
        _check(ours[subset], _package(tmp_path, subset))


def test_an_exported_clip_has_its_scores_in_vggsounders_order(
    labels: TrueLabels, tmp_path: Path
) -> None:
    given = _random(labels, labels.clip_ids[:3])
    write_pickle(tmp_path / "mine.pkl", given)
    content = pickle.loads((tmp_path / "mine.pkl").read_bytes())
    logits = content[labels.clip_ids[1]]["logits"]
    for name, stream in (("a", "audio"), ("v", "video"), ("av", "fusion")):
        by_name = dict(zip(given.about.classes, given.scores[stream][1], strict=True))
        np.testing.assert_array_equal(logits[name], [by_name[c] for c in labels.classes])
    foreign = given._replace(about=given.about._replace(classes=["x", *given.about.classes[1:]]))
    with pytest.raises(TrainingError, match="'x'; its files have no place"):
        write_pickle(tmp_path / "mine.pkl", foreign)


def test_a_class_the_run_cannot_say_is_never_hit(labels: TrueLabels) -> None:
    given = _random(labels, labels.clip_ids[::40])
    few = 50
    less = predictions(
        given.clip_ids,
        given.about.classes[:few],
        given.labels_M % few,
        {stream: scores_MC[:, :few] for stream, scores_MC in given.scores.items()},
    )
    joined = join(less, labels)
    assert sorted(joined.missing_classes) == sorted(given.about.classes[few:])
    lost = set(joined.missing_classes)
    of_lost = [labels.classes[index] in lost for index in labels.class_R]
    for rank_R in joined.ranks.values():
        assert (rank_R[np.array(of_lost) & (rank_R >= 0)] >= few).all()


def _labels_of(rows: list[tuple[str, str, str]]) -> TrueLabels:
    clips, classes = list(dict.fromkeys(r[0] for r in rows)), ["dog", "cat", "car", "sea"]
    return TrueLabels(
        source={},
        clip_ids=clips,
        classes=classes,
        clip_R=np.array([clips.index(r[0]) for r in rows]),
        class_R=np.array([classes.index(r[1]) for r in rows]),
        modality_R=np.array([r[2] for r in rows]),
        flags={},
    )


@pytest.mark.parametrize(
    ("true", "said", "kinds"),
    [
        # The clip's own label is dog; what is said, and what that is in audio, video, fusion.
        ([("dog", "AV")], "cat", ("real", "real", "real")),
        ([("dog", "AV"), ("cat", "AV")], "cat", ("both_true",) * 3),
        ([("cat", "AV")], "cat", ("label_false",) * 3),
        ([("cat", "AV")], "car", ("not_perceivable",) * 3),
        ([("dog", "V")], "cat", ("not_perceivable", "real", "real")),
        ([("dog", "A"), ("cat", "V")], "cat", ("real", "both_true", "both_true")),
        ([("dog", "V"), ("cat", "A")], "cat", ("both_true", "real", "both_true")),
    ],
)
def test_an_error_is_what_the_true_labels_say_it_is(
    true: list[tuple[str, str]], said: str, kinds: tuple[str, ...]
) -> None:
    labels = _labels_of([("clip", *each) for each in true])
    classes = ["sea", "car", "cat", "dog"]
    scores = np.eye(4, dtype=np.float32)[[classes.index(said)]]
    given = predictions(["clip"], classes, [classes.index("dog")], dict.fromkeys(STREAMS, scores))
    found = split_errors(given, labels)
    assert tuple(next(k for k, n in found[s].kinds.items() if n) for s in STREAMS) == kinds
    assert found["fusion"].pairs[0][:2] == ("dog", said)


def test_kinds_sum_to_the_errors_of_the_clips_that_are_judged(labels: TrueLabels) -> None:
    clip_ids = [*labels.clip_ids[::20], "notamong000_000000"]
    given = _random(labels, clip_ids)
    for stream, split in split_errors(given, labels).items():
        wrong = given.scores[stream].argmax(1)[:-1] != given.labels_M[:-1]
        assert split.n_clips == len(clip_ids) - 1
        assert sum(split.kinds.values()) == split.n_errors == wrong.sum()


def test_labels_say_whose_they_are_and_refuse_another_file(tmp_path: Path) -> None:
    found = read_labels()
    assert found.source["package"] == "vggsounder 1.0"
    assert found.source["file"] == "vggsounder+background-music.csv"
    assert len(found.clip_ids) == 15_069
    assert (len(found.class_R), len(found.classes)) == (37_395, 309)
    other = tmp_path / "labels.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(TrainingError, match="found a, b; VGGSounder has video_id"):
        read_labels(str(other))
