"""`diccae predict` on files of its own: no store, no Ray, and a reason for what is broken."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.disks import small_disk
from support.models import CLASSES, evaluated, measured, saved_models

from diccae.cli import main
from pipeline.reasons import Reason, Rejected
from pipeline.synth import write_clips
from training.predict.predictor import Answer, Guess, StreamAnswer
from training.predict.told import as_lines
from training.weights.measured import write_measured

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` with models that were evaluated; `clips/` with two clips, and broken ones beside."""
    place = tmp_path_factory.mktemp("predict")
    saved_models(str(place / "run"))
    evaluated(place / "run")
    write_clips(place / "made", n_train=3, n_test=0, seed=1, size=32, workers=1)
    (place / "clips").mkdir()
    for name, clip in zip("abc", sorted((place / "made" / "videos").iterdir()), strict=True):
        shutil.copy(clip, place / "clips" / f"{name}.mp4")
    (place / "clips" / "c.mp4").rename(place / "<i>c.mp4")
    (place / "broken.mp4").write_bytes(b"no video at all")
    return place


def test_files_folders_uris_and_broken_clips_in_one_call(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    remote = fsspec.filesystem("memory")
    remote.pipe_file("/there/d.mp4", Path("clips/a.mp4").read_bytes())
    clips = ["<i>c.mp4", "broken.mp4", "clips", "gone.mp4", "memory://there/d.mp4", "nowhere://x"]
    written = ["--html", "to/page.html", "--embeddings", "to/vectors.parquet"]
    assert main(["predict", "--model", "run", "--json", "--top", "2", *written, *clips]) == 3
    found = json.loads(capsys.readouterr().out)
    names = ["<i>c.mp4", "broken.mp4", "clips/a.mp4", "clips/b.mp4", *clips[3:]]
    assert [each["clip"] for each in found["clips"]] == names
    assert found["n_failed"] == 3
    by_name = {each["clip"]: each for each in found["clips"]}
    reasons = {name: each["reason"] for name, each in by_name.items() if "reason" in each}
    failed = {"broken.mp4": "open_failed", "gone.mp4": "missing", "nowhere://x": "open_failed"}
    assert reasons == failed
    _check_answer(by_name["clips/a.mp4"])
    here, there, another = (by_name[n]["p"] for n in (names[2], names[5], names[3]))
    assert there == pytest.approx(here, abs=1e-6)
    assert another != pytest.approx(here, abs=1e-3)
    _check_page(Path("to/page.html").read_text(), n_clips=4)
    _check_vectors(pq.read_table("to/vectors.parquet"), [n for n in names if n not in failed])


def _check_answer(clip: dict[str, Any]) -> None:
    assert set(clip["streams"]) == {"audio", "video", "fusion"}
    for answer in clip["streams"].values():
        first, second = answer["classes"]
        assert 0 < second["p"] <= first["p"] < 1
        assert answer["margin"] == first["p"] - second["p"]
    assert clip["class"] == clip["streams"]["fusion"]["classes"][0]["name"]
    following = dict(zip(CLASSES, [*CLASSES[1:], CLASSES[0]], strict=True))
    confused = clip["confused_with"]
    assert (confused["class"], confused["decided_by"]) == (following[clip["class"]], "audio")
    assert confused["told_apart"]["video"] == 0.6


def _check_page(page: str, n_clips: int) -> None:
    assert "default-src 'none'" in page
    assert 'name="color-scheme" content="light dark"' in page
    assert not re.search(r"""(?:src|href)="(?!data:|#)""", page)
    assert page.count("data:audio/webm;base64,") == n_clips
    assert page.count("data:image/jpeg;base64,") == 4 * n_clips
    assert "<i>c" not in page
    assert "<b>bell" not in page
    assert "open_failed: Invalid data" in page


def test_what_of_a_longer_clip_is_not_used_is_said_wherever_the_answer_is(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's features are of 1 s, the clip of 2 s."""
    monkeypatch.chdir(place)
    asked = ["predict", "--model", "run", "clips/a.mp4"]
    assert main([*asked, "--html", "long.html"]) == 0
    said = "1.0 of 2.0 s used, from the beginning"
    assert f"\n  {said}\n" in capsys.readouterr().out
    assert f"<p>{said}</p>" in Path("long.html").read_text()
    assert main([*asked, "--json"]) == 0
    (clip,) = json.loads(capsys.readouterr().out)["clips"]
    assert (clip["used_s"], clip["clip_s"]) == (1.0, pytest.approx(2.0, abs=0.05))
    assert main([*asked, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {(row["used_s"], row["clip_s"]) for row in rows} == {("1.0", str(clip["clip_s"]))}


def _check_vectors(table: Any, names: list[str]) -> None:
    assert table["id"].to_pylist() == names
    for stream in ("audio", "video", "fusion", "embedding"):
        lengths = np.linalg.norm(np.stack(table[stream].to_numpy()), axis=1)
        np.testing.assert_allclose(lengths, 1, atol=1e-6)


_IMPORTED = """
import sys
from diccae.cli import main
code = main(sys.argv[1:])
heavy = {"ray", "mlflow", "deltalake", "pandas", "faiss", "torchaudio"} & set(sys.modules)
print(*sorted(heavy), file=sys.stderr)
sys.exit(code)
"""


def test_csv_of_a_model_that_was_evaluated_with_other_weights_imports_only_what_it_needs(
    place: Path, tmp_path: Path
) -> None:
    """And does not tell what they confused."""
    shutil.copytree(place / "run" / "classifier", tmp_path / "model")
    write_measured(str(tmp_path / "model"), measured(place / "run")._replace(sha256="0" * 64))
    command = [sys.executable, "-c", _IMPORTED, "predict", "--model", str(tmp_path / "model")]
    done = subprocess.run(
        [*command, "--csv", "clips/a.mp4"],
        cwd=place,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said, imported = done.stderr.splitlines()
    assert "was not evaluated: what it confuses is not known" in said
    assert imported == ""
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["stream"], row["rank"]) for row in rows[:4]] == [
        ("audio", str(rank)) for rank in (1, 2, 3, 4)
    ]
    assert sum(float(row["p"]) for row in rows) == pytest.approx(3)
    assert {row["decided_by"] for row in rows} == {""}


def test_a_person_reads_classes_margin_and_what_decides(place: Path) -> None:
    confused = measured(place / "run").confusions[0]
    stream = StreamAnswer([Guess(CLASSES[0], 0.75), Guess(CLASSES[3], 0.125)], 0.625)
    answer = Answer(streams={"fusion": stream}, confused=confused)
    assert list(as_lines("a.mp4", answer)) == [
        "a.mp4",
        "  fusion  dog, barking 75.0 %, rain 12.5 %; margin 62.5 %",
        "  dog, barking is most often confused with wolf (25.0 % of 20 clips); told apart by "
        "audio 9 of 10, video 6 of 10, fusion 9 of 10: audio decides",
    ]
    whole = answer._replace(used_s=10.0, clip_s=10.04)
    assert list(as_lines("a.mp4", whole)) == list(as_lines("a.mp4", answer))
    broken = Answer(Rejected(Reason.NO_AUDIO, "the file has no audio stream"))
    assert list(as_lines("b.mp4", broken)) == ["b.mp4  no_audio: the file has no audio stream"]


@pytest.mark.parametrize(
    ("model", "options", "code", "said"),
    [
        ("run/encoder", [], 2, "is an encoder, which names no classes"),
        ("run/classifier", ["--embeddings", "v.parquet"], 2, "is a classifier alone"),
        ("clips", [], 1, "no model there: expected classifier/ or encoder/"),
        ("run", ["--json", "--csv"], 2, "choose one"),
        ("run", ["--top", "0"], 2, "--top 0: at least 1"),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_line(
    place: Path,
    model: str,
    options: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    assert main(["predict", "--model", model, *options, "clips/a.mp4"]) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_model_of_before_says_what_to_do(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "run" / "classifier", tmp_path / "old")
    (tmp_path / "old" / "measured.json").write_text("{}")
    assert main(["predict", "--model", str(tmp_path / "old"), str(place / "clips" / "a.mp4")]) == 1
    assert "measured.json is not what an evaluation writes" in capsys.readouterr().err
    (tmp_path / "old" / "measured.json").unlink()
    card = json.loads((tmp_path / "old" / "classifier.json").read_text())
    clip = str(place / "clips" / "a.mp4")
    for missing, said in (("applied", "run diccae evaluate"), ("feature_spec", "fine-tune it")):
        del card[missing]
        (tmp_path / "old" / "classifier.json").write_text(json.dumps({"feature_spec": {}} | card))
        assert main(["predict", "--model", str(tmp_path / "old"), clip]) == 1
        assert said in capsys.readouterr().err


def test_what_is_written_may_lie_in_a_bucket_and_a_folder_is_refused_at_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    there = "memory://predicted"
    written = ["--html", f"{there}/page.html", "--embeddings", f"{there}/v.parquet"]
    assert main(["predict", "--model", "run", *written, "clips/a.mp4"]) == 0
    assert not list(place.glob("memory*"))
    remote = fsspec.filesystem("memory")
    _check_page(remote.cat_file("/predicted/page.html").decode() + "open_failed: Invalid data", 1)
    with remote.open("/predicted/v.parquet") as file:
        _check_vectors(pq.read_table(file), ["clips/a.mp4"])
    capsys.readouterr()
    for option in ("--html", "--embeddings"):
        assert main(["predict", "--model", "run", option, "clips", "clips/a.mp4"]) == 2
        printed = capsys.readouterr()
        assert f"{option} clips: a folder; name a file in it" in printed.err
        assert printed.out == ""


def test_a_full_disk_is_named_with_the_file_that_did_not_fit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    with small_disk(tmp_path / "small", "8k") as folder:
        page = folder / "page.html"
        assert main(["predict", "--model", "run", "--html", str(page), "clips/a.mp4"]) == 1
        printed = capsys.readouterr().err
        assert f"No space left on device for {page}: make room there" in printed
        assert "the disk is full" in printed
        assert "TMPDIR" not in printed
        assert "endpoint" not in printed
        assert not list(folder.iterdir())


def test_vectors_of_no_clip_are_not_written_and_the_clips_answers_are(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    options = ["--json", "--embeddings", "none.parquet"]
    assert main(["predict", "--model", "run", *options, "broken.mp4"]) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out)["n_failed"] == 1
    assert "none.parquet: 0 clips, so it was not written" in printed.err
    assert not Path("none.parquet").exists()


def test_a_name_that_is_not_utf8_costs_that_clip_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    name = os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(place / "clips" / "a.mp4", name)
    assert main(["predict", "--model", "run", "--html", "named.html", name, "clips/a.mp4"]) == 3
    printed = capsys.readouterr()
    assert "caf\ufffd.mp4  open_failed: its name is not UTF-8" in printed.out
    assert "clips/a.mp4\n  audio " in printed.out
    assert "caf\ufffd.mp4" in Path("named.html").read_text()
