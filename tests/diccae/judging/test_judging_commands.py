"""`evaluate --vggsounder` and `compare`, on run folders of synthetic predictions."""

import json
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from support.predicted import STREAMS, predicted_run, predictions, softmax

from diccae.cli import main
from diccae.config import RunConfig, digests_of_text
from training.evaluation.predictions import FILE, Predictions, read_predictions
from training.report.markup import percent
from training.vggsounder.exchange import write_pickle
from training.vggsounder.labels import read_labels

LABELS = read_labels()
CLIPS = LABELS.clip_ids[:600]


def _predictions(seed: int, classes: list[str] | None = None, lift: float = 3.0) -> Predictions:
    """Of VGGSound clips: right for about half of them."""
    rng = np.random.default_rng(seed)
    names = classes or LABELS.classes
    first = {clip: k for clip, k in zip(LABELS.clip_R[::-1], LABELS.class_R[::-1], strict=True)}
    own = np.array([names.index(LABELS.classes[first[i]]) for i in range(len(CLIPS))])
    scores = {}
    for stream in STREAMS:
        x = rng.normal(size=(len(CLIPS), len(names)))
        x[np.arange(len(CLIPS)), own] += lift
        scores[stream] = softmax(x)
    return predictions(CLIPS, names, own, scores, [clip_id[:11] for clip_id in CLIPS])


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs `a` and `b`, which order their classes differently; `b` is better."""
    monkeypatch.chdir(tmp_path)
    predicted_run(tmp_path / "a", _predictions(1))
    classes = np.random.default_rng(0).permutation(LABELS.classes).tolist()
    predicted_run(tmp_path / "b", _predictions(2, classes, lift=4.0))
    return tmp_path


def test_predictions_come_back_bit_by_bit(tmp_path: Path) -> None:
    given = _predictions(1)
    folder = predicted_run(tmp_path / "run", given)
    found = read_predictions(folder / "evaluation" / FILE)
    assert (found.clip_ids, found.groups, found.about) == (
        given.clip_ids,
        given.groups,
        given.about,
    )
    for stream in STREAMS:
        np.testing.assert_array_equal(found.scores[stream], given.scores[stream])


def test_vggsounder_goes_into_results_with_whose_labels_they_are(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--out", "b", "--reuse", "--vggsounder"]) == 0
    printed = capsys.readouterr().out
    assert "VGGSounder, no background music" in printed
    found = json.loads(Path("b/results.json").read_text(), parse_constant=pytest.fail)["vggsounder"]
    assert found["labels"]["package"] == "vggsounder 1.0"
    assert len(found["labels"]["sha256"]) == 64
    assert (found["n_clips"], found["n_missing"]) == (600, 15_069 - 600)
    assert Path("b/evaluation/vggsounder_missing.txt").read_text().splitlines()[0] not in CLIPS
    for split in found["label_noise"].values():
        assert sum(kind["share"] for kind in split["kinds"].values()) == pytest.approx(1)
    assert found["scores"]["all"]["a"]["hit_rate@1"] > 0.3


def test_exported_predictions_are_the_run_itself_and_another_order_is_not(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--out", "b", "--reuse", "--export-predictions", "b.pkl"]) == 0
    capsys.readouterr()
    assert main(["compare", "b", "--predictions", "b.pkl", "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    for stream in STREAMS:
        found = same["streams"][stream]["all"]
        assert (found["only_a"], found["only_b"], found["p"]) == (0, 0, 1.0)
    names = Path("names.csv")
    own = read_predictions(Path("b/evaluation") / FILE).about.classes
    names.write_text("display_name\n" + "\n".join(f'"{name}"' for name in own))
    arguments = ["compare", "b", "--predictions", "b.pkl", "--classes", "names.csv", "--json"]
    assert main(arguments) == 0
    wrong = json.loads(capsys.readouterr().out)["streams"]["fusion"]["all"]
    assert wrong["b"] < 0.1 < wrong["a"]


def test_runs_are_compared_by_name_as_table_json_and_page(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "a", "b", "--html", "c.html", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    given = {name: read_predictions(Path(name) / "evaluation" / FILE) for name in "ab"}
    for stream in STREAMS:
        whole = found["streams"][stream]["all"]
        for name in "ab":
            right = given[name].scores[stream].argmax(1) == given[name].labels_M
            assert whole[name] == pytest.approx(right.mean())
        assert whole["low"] < whole["difference"] < whole["high"]
        assert whole["p"] < 1e-3
        n_classes = sum(one["n_clips"] for one in found["streams"][stream]["classes"])
        assert n_classes == found["n_clips"] == len(CLIPS)
    assert found["pairs_chosen_on"] == "the clips compared"
    page = Path("c.html").read_text()
    assert 'name="color-scheme" content="light dark"' in page
    assert "script-src" not in page
    assert not re.search(r"(src|href)=|@import|url\((?!data)", page)
    assert all(percent(found["streams"][s]["all"]["b"]) in page for s in STREAMS)
    assert main(["compare", "a", "b"]) == 0
    assert "600 clips of" in capsys.readouterr().out


def test_pairs_are_those_that_training_clips_confuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [["dog barking", "cat meowing", 0.4]]
    confusion = {"training_pairs": chosen}
    for seed, name in ((1, "a"), (2, "b")):
        predicted_run(tmp_path / name, _predictions(seed), confusion=confusion)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs_chosen_on"] == "training clips"
    assert {one["name"] for one in found["streams"]["audio"]["pairs"]} <= {
        "cat meowing / dog barking"
    }


def test_clips_of_one_model_alone_are_listed(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f'{clip_id},"{LABELS.classes[0]}"' for clip_id in [*CLIPS[5:], "elsewhere__000000"]]
    Path("other.csv").write_text("\n".join(["id,audio", *rows]))
    assert main(["compare", "a", "--predictions", "other.csv", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["only_a"] == CLIPS[:5]
    assert found["only_b"] == ["elsewhere__000000"]
    assert list(found["streams"]) == ["audio"]


@pytest.mark.slow
@pytest.mark.parametrize("way", [0, 1], ids=["as now", "of whole sections"])
def test_predictions_of_a_version_that_knew_fewer_keys_are_reused(runs: Path, way: int) -> None:
    text = (runs / "a" / "config.yaml").read_text()
    earlier = text.replace(f"  few_labels: {RunConfig().evaluate.few_labels}\n", "")
    assert earlier != text
    about = _predictions(1).about._replace(config_hash=digests_of_text(earlier)[way])
    given = _predictions(1)._replace(about=about)
    (predicted_run(runs / f"old{way}", given) / "config.yaml").write_text(earlier)
    assert main(["evaluate", "--out", f"old{way}", "--reuse", "--vggsounder"]) == 0
    assert main(["evaluate", "--out", f"old{way}", "--reuse", "--evaluate.few-labels", "3"]) == 2
    # Not any config of an earlier version: of these keys another value.
    (runs / f"old{way}" / "config.yaml").write_text(earlier.replace("knn_k: ", "knn_k: 1"))
    assert main(["evaluate", "--out", f"old{way}", "--reuse", "--vggsounder"]) == 2


def test_predictions_from_before_a_fine_tuning_are_not_reused(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config is the same; the probe that stood in for a classifier is not what is asked for."""
    about = _predictions(1).about._replace(models={"encoder": "1" * 64})
    run = predicted_run(runs / "tuned", _predictions(1)._replace(about=about))
    reuse = ["evaluate", "--out", "tuned", "--reuse", "--vggsounder"]
    for kind, digest in (("encoder", "1" * 64), ("classifier", "2" * 64)):
        (run / kind).mkdir()
        (run / kind / f"{kind}.json").write_text(json.dumps({"sha256": digest}))
        assert main(reuse) == (0 if kind == "encoder" else 2)
    assert "of other weights than the run has now" in capsys.readouterr().err


def test_predictions_from_before_a_fine_tuning_are_not_compared(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are of a probe, or of a classifier that is another one by now."""
    models = {"encoder": "1" * 64, "classifier": "2" * 64}
    for known in ({"encoder": models["encoder"]}, models):
        about = _predictions(1).about._replace(models=known)
        name = f"with-{len(known)}"
        run = predicted_run(runs / name, _predictions(1)._replace(about=about))
        assert main(["compare", "a", name]) == 0, "weights that are gone are no other weights"
        for kind, digest in models.items():
            (run / kind).mkdir()
            (run / kind / f"{kind}.json").write_text(json.dumps({"sha256": digest}))
        assert main(["compare", "a", name]) == (0 if known == models else 2)
    (run / "classifier" / "classifier.json").write_text(json.dumps({"sha256": "3" * 64}))
    capsys.readouterr()
    assert main(["compare", name, "a"]) == 2
    said = capsys.readouterr().err
    assert "of other weights than the run has now (classifier of it came since)" in said
    assert f"run diccae evaluate --out {run} first" in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["compare", "a"], 2, "name a second run, or a file with --predictions"),
        (["compare", "a", "b", "--predictions", "x.pkl"], 2, "name a second run, or a file"),
        (["compare", "a", "nowhere"], 1, "run diccae evaluate on the run first"),
        (["compare", "a", "--predictions", "evil.pkl"], 1, "nothing of it was run"),
        (["compare", "a", "b", "c"], 2, "found 3 runs"),
        (["compare", "a", "b", "--classes", "c.csv"], 2, "names what --predictions scores"),
        (["evaluate", "--out", "a", "--reuse", "--evaluate.knn-k", "3"], 2, "leave out --reuse"),
        (["evaluate", "--out", "other", "--reuse", "--vggsounder"], 2, "none of the run's 2 clips"),
        (["evaluate", "--out", "halfway", "--reuse"], 2, "holds no results of the evaluation"),
        (["evaluate", "--out", "a", "--vggsounder-labels", "no.csv"], 1, "labels cannot be read"),
        (["evaluate", "--out", "a", "--export-predictions", "b"], 2, "a folder; name a file in it"),
        (["compare", "a", "--predictions", "numbers.csv"], 1, "none of the 2 names in it, such as"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    Path("evil.pkl").write_bytes(pickle.dumps({"x": print}))
    scores = dict.fromkeys(STREAMS, softmax(np.eye(2)))
    predicted_run(Path("other"), predictions(["x", "y"], ["p", "q"], [0, 1], scores))
    predicted_run(Path("halfway"), predictions(["x", "y"], ["p", "q"], [0, 1], scores))
    Path("halfway/results.json").unlink()
    Path("numbers.csv").write_text(f"id,av\n{CLIPS[0]},0\n{CLIPS[1]},17\n")
    capsys.readouterr()
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err


def test_the_documents_examples_do_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the one that applies models."""
    monkeypatch.chdir(tmp_path)
    for seed, name in ((1, "run"), (2, "other")):
        predicted_run(Path("out") / name, _predictions(seed))
    write_pickle(Path("cav-mae.pkl"), _predictions(3))
    Path("theirs.csv").write_text(f'clip_id,av\n{CLIPS[0]},"{LABELS.classes[0]}"\n')
    page = (Path(__file__).parents[3] / "docs" / "comparing.md").read_text()
    lines = [shlex.split(line) for line in page.splitlines() if line.startswith("diccae ")]
    run = [words for words in lines if words[1] == "compare" or "--reuse" in words]
    assert (len(lines), len(run)) == (5, 4)
    for words in run:
        assert main(words[1:]) == 0, words
    assert Path("compare.html").exists()
    assert Path("run.pkl").exists()


def test_runs_whose_clips_have_other_labels_are_not_compared(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = _predictions(3)
    predicted_run(Path("c"), given._replace(labels_M=np.roll(given.labels_M, 1)))
    assert main(["compare", "a", "c"]) == 2
    assert "clips have other labels, such as" in capsys.readouterr().err


def test_judging_needs_neither_ray_nor_torch() -> None:
    code = (
        "import sys, diccae.commands.compare, diccae.judging.compare, diccae.judging.vggsounder; "
        "print({'ray', 'torch', 'mlflow'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_pages_and_predictions_are_written_to_folders_to_make_and_to_uris(runs: Path) -> None:
    remote = fsspec.filesystem("memory")
    for place in ("new/folder", "memory://judged"):
        assert main(["compare", "a", "b", "--html", f"{place}/c.html"]) == 0
        export = ["--export-predictions", f"{place}/b.pkl"]
        assert main(["evaluate", "--out", "b", "--reuse", *export]) == 0
    assert not list(runs.glob("memory*"))
    for name in ("c.html", "b.pkl"):
        assert remote.cat_file(f"/judged/{name}") == Path("new/folder", name).read_bytes()


def test_predictions_and_their_classes_may_be_in_a_bucket(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = fsspec.filesystem("memory")
    given = _predictions(3)
    scores = {clip: {"logits": {"av": scores_C}} for clip, scores_C in
              zip(given.clip_ids, given.scores["fusion"], strict=True)}  # fmt: skip
    remote.pipe_file("/theirs/p.pkl", pickle.dumps(scores))
    rows = [f'{k},m,"{name}"' for k, name in enumerate(given.about.classes)]
    listed = "\n".join(["index,mid,display_name", *rows])
    remote.pipe_file("/theirs/classes.csv", listed.encode())
    named = ["--predictions", "memory://theirs/p.pkl", "--classes", "memory://theirs/classes.csv"]
    assert main(["compare", "a", *named]) == 0
    remote.pipe_file("/theirs/p.pkl", pickle.dumps({CLIPS[0]: {"logits": {"av": [1.0]}}}))
    capsys.readouterr()
    assert main(["compare", "a", *named]) == 1
    assert f"memory://theirs/p.pkl: clip {CLIPS[0]}, av: scores of" in capsys.readouterr().err


def test_a_class_of_the_run_is_known_though_no_clip_has_it_and_no_model_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = dict.fromkeys(STREAMS, np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]], np.float32))
    predicted_run(tmp_path / "a", predictions(["x", "y"], ["dog", "cat", "owl"], [0, 1], scores))
    Path("theirs.csv").write_text("clip_id,av\nx,owl\ny,wolf\n")
    capsys.readouterr()
    assert main(["compare", "a", "--predictions", "theirs.csv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unknown"] == ["wolf"]


def _own_label(clip: int) -> str:
    given = _predictions(1)
    return str(given.about.classes[given.labels_M[clip]])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("marked.csv", f'\ufeffclip_id,av\n{CLIPS[0]},"{_own_label(0)}"\n'),
        ("spaced.csv", f'clip_id, av\n{CLIPS[0]}, "{_own_label(0)}"\n'),
        ("alone.json", json.dumps({CLIPS[0]: {"predictions": {"av": _own_label(0)}}})),
        ("listed.json", json.dumps({CLIPS[0]: {"predictions": {"av": [_own_label(0)]}}})),
    ],
)
def test_a_right_answer_of_another_project_is_right_however_it_is_written(
    runs: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    Path(name).write_text(content, encoding="utf-8")
    assert main(["compare", "a", "--predictions", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n_clips"], found["unknown"]) == (1, [])
    assert found["streams"]["fusion"]["all"]["b"] == 1.0


def test_a_probe_beside_a_classifier_is_named_as_one(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = _predictions(3)
    predicted_run(Path("c"), given._replace(about=given.about._replace(scorer="probe")))
    for other, named in (("c", ["a (classifier)", "c (probe)"]), ("b", ["a", "b"])):
        assert main(["compare", "a", other, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [found["a"], found["b"]] == named
