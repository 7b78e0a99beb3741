"""The report of a run: what is on the page, what is left out, and that a browser can show it."""

import base64
import html
import io
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from support.browser import CUT_OFF, FAINT, NAMELESS, Browser
from support.run_parts import curves, publish_round, write_metrics, write_predicted

from pipeline.config import FeatureSpec
from pipeline.errors import PipelineError
from pipeline.source.files import local_file
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.shards import ShardWriter
from pipeline.store.store import FeatureStore
from pipeline.synth import write_video
from training.data.rows import clip_keys
from training.errors import TrainingError
from training.report.folder import read_run
from training.report.page import write_report

CLASSES = [
    "playing violin", "playing cello", "dog barking", "wolf howling",
    "playing_the_church_bell_while_singing_in_a_crowded_subway_station",
    "playing_the_alarm_clock_while_singing_in_a_crowded_subway_station",
    "child speech, kid speaking", "<script>alert('x')</script>", "rain", "printer",
]  # fmt: skip
TWIN = {0: 1, 2: 3, 4: 5, 6: 7}
PER_CLASS = 16
WIDTH = 8


def _clip_id(split: str, label: int, index: int) -> str:
    start = "-_A"[index % 3]
    return f"{start}{split[:3]}{label:02d}x{index:04d}_{index:06d}"


CLIPS = [
    (_clip_id(split, label, index), label, split)
    for split in ("train", "test")
    for index in range(PER_CLASS)
    for label in range(len(CLASSES))
]


def _frame(label: int, index: int, size: int = 96) -> bytes:
    """A picture by which a class can be told: its colour and its shape."""
    rng = np.random.default_rng([label // 2, index])
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    angle = label * 2.4 + rng.normal(0, 0.3)
    wave = np.sin(2 * np.pi * (2 + label % 5) * (x * np.cos(angle) + y * np.sin(angle)))
    disc = np.hypot(x - rng.uniform(-0.2, 0.2), y - rng.uniform(-0.2, 0.2)) < 0.22
    colour = np.array([np.cos(label), np.cos(label + 2.1), np.cos(label + 4.2)]) * 70 + 120
    image = colour + wave[..., None] * 28 + disc[..., None] * 70 + rng.normal(0, 6, (size, size, 1))
    return simplejpeg.encode_jpeg(np.clip(image, 0, 255).astype(np.uint8), quality=90)


def _fbank(label: int, index: int) -> bytes:
    t, m = np.mgrid[0:64, 0:32]
    tone = 6 * np.exp(-(((m - 3 * label - 2 * np.sin(t / (3 + index % 4))) / 2.0) ** 2))
    return (tone - 8 + 0.3 * np.sin(t * m)).astype(np.float16).tobytes()


def make_store(uri: str) -> FeatureStore:
    """A real store of two shards; clips of every class and split.

    All train clips are one file beside the store; the sources of the test clips are gone.
    """
    source = Path(uri).parent / "source.mp4"
    moving = np.random.default_rng(0).integers(0, 255, (18, 64, 64, 3), np.uint8)
    write_video(str(source), moving, np.sin(np.arange(24000) / 5) / 3, fps=12, rate_hz=16000)
    file = local_file(str(source), source.stat())
    there = {n: getattr(file, n) for n in ("uri", "size", "mtime_ns", "fp_kind", "fp")}
    gone = there | {"uri": str(source.with_name("gone.mp4"))}
    spec = FeatureSpec(n_frames=3, frame_size=96, fbank_frames=64, n_mels=32)
    store = FeatureStore.create(uri, spec)
    rows = []
    for number, split in enumerate(("train", "test")):
        name = f"features/part-run-{number:04d}-0.parquet"
        shard = ShardWriter(store.location, name, spec)
        for index, (clip_id, label, _) in enumerate(c for c in CLIPS if c[2] == split):
            row = {"clip_id": clip_id, "row_key": clip_id, "label": CLASSES[label], "split": split}
            jpegs = [_frame(label, index + at) for at in range(3)]
            sound = {"fbank": _fbank(label, index), "fbank_frames": 50}
            position = shard.add({**row, **sound, "frames": jpegs, "frame_ts_ms": [0, 1, 2]})
            state = {"status": "ok", "spec_hash": spec.spec_hash(), "shard": name, "row": position}
            of_file = there if split == "train" else gone
            rows.append({name: None for name in CLIPS_SCHEMA.names} | row | state | of_file)
        shard.publish()
    store.append(pa.Table.from_pylist(rows, CLIPS_SCHEMA), {})
    return store


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _metrics(folder: Path) -> None:
    write_metrics(folder / "metrics.jsonl", curves(np.linspace(0, 1, 120), labelled_from=1 / 3))
    losses = [(step, 2.3 * np.exp(-step / 90)) for step in range(10, 300, 10)]
    tuned = [
        {"step": s, "time": 1.77e9, "finetune/loss": x, "finetune/lr": 1e-4} for s, x in losses
    ]
    (folder / "finetune.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tuned))


def _rounds(folder: Path) -> None:
    rng = np.random.default_rng(1)
    train = [(clip_id, label) for clip_id, label, split in CLIPS if split == "train"]
    keys_N = clip_keys([clip_id for clip_id, _ in train])
    for number in range(1, 5):
        taken = [label if rng.random() < 0.8 else TWIN.get(label, 9) for _, label in train]
        labels = {"audio": np.array(taken, np.int32)}
        why = "collapse guard: effective_clusters 1.2 < 5" if number == 3 else ""
        step = 300 * number
        publish_round(folder, number, step, keys_N, labels, n_clusters=10, width=WIDTH, reason=why)


def _evaluation(folder: Path) -> None:
    rng = np.random.default_rng(2)
    test = [(clip_id, label) for clip_id, label, split in CLIPS if split == "test"]
    truth_M = np.array([label for _, label in test])
    hit = {"audio": 0.7, "video": 0.75, "fusion": 0.9}
    wrong_M = np.array([TWIN.get(int(label), (int(label) + 1) % 10) for label in truth_M])
    predicted = {
        stream: np.where(rng.random(len(truth_M)) < share, truth_M, wrong_M)
        for stream, share in hit.items()
    }
    sure_M = rng.uniform(0.4, 1, len(test))
    vectors = {}
    for stream in hit:
        x_MP = np.eye(len(CLASSES), WIDTH)[truth_M] + rng.normal(0, 0.3, (len(truth_M), WIDTH))
        unit_MP = x_MP / np.linalg.norm(x_MP, axis=1, keepdims=True)
        vectors[stream] = unit_MP.astype(np.float32)
    ids = [clip_id for clip_id, _ in test]
    write_predicted(folder, ids, CLASSES, truth_M, predicted, sure_M=sure_M, embeddings=vectors)


def make_run(folder: Path, store_uri: str) -> Path:
    """A run folder with every part, as the trainer leaves it."""
    folder.mkdir(parents=True)
    _metrics(folder)
    _rounds(folder)
    _evaluation(folder)
    digest = FeatureStore.open(store_uri).snapshot(1).digest
    store = {"uri": store_uri, "version": 1, "digest": digest}
    versions = {"torch": "2.11.0", "ray": "2.60.0", "python": "3.11.7", "diccae": "0.1.0"}
    run = {"name": "fake <run>", "config_hash": "c0ffee", "versions": versions, "store": store}
    run |= {"started": "2026-11-20T21:00:00Z", "mlflow": {"uri": "sqlite:///x", "run_id": "abc"}}
    _write_json(folder / "run.json", run)
    by_stream = {"audio": 0.71, "video": 0.76, "fusion": 0.9125}
    results = {"encoder": "tiny", "n_train": 160, "n_test": 160, "top1": by_stream}
    results |= {"top5": {"audio": 0.95, "video": 0.97, "fusion": 1.0}, "map": by_stream}
    results |= {"probe": by_stream | {"audio_video": 0.88}, "pair_accuracy": by_stream}
    results |= {"knn": by_stream | {"audio_video": 1.0}, "confusion": {"training_pairs": [[]] * 3}}
    results |= {"retrieval": {"a2v_r1": 0.31, "a2v_r5": 0.6, "v2a_r1": 0.3, "v2a_r5": 0.58}}
    results["retrieval"] |= {"n_clips": 40.0, "a2v_median_rank": 4.5, "a2v_r10": 0.875}
    results["retrieval"] |= {"a2v_class_r1": 0.999, "a2v_class_map": 0.875}
    results["retrieval_middle_frame"] = results["retrieval"] | {"a2v_r1": 0.27}
    results |= {"pseudo_labels": {"k": 10, "nmi": 0.62, "churn": [0.4, 0.2, 0.1]}}
    seconds = {"ingest": 12.0, "pretrain": 95.0, "cluster": 3.1, "finetune": 25, "evaluate": 4.5}
    _write_json(folder / "results.json", results | {"seconds": seconds, "store": store})
    (folder / "config.yaml").write_text("seed: 0\nencoder:\n  preset: tiny\n")
    return folder


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    store = make_store(str(folder / "store"))
    return make_run(folder / "run", store.uri)


@pytest.fixture(scope="session")
def whole_page(whole_run: Path) -> str:
    return Path(write_report(whole_run)).read_text()


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the whole run, to take parts from."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def _text(page: str) -> str:
    """What a reader sees without scripts."""
    body = page[page.index("<body>") : page.index("<script")]
    return html.unescape(re.sub(r"<[^>]+>", " ", body)).replace("\N{NO-BREAK SPACE}", " ")


def test_page_is_whole_and_fetches_nothing(whole_page: str) -> None:
    page = whole_page
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["']?(?!data:|#)[^"'>]""", page)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page)
    for anchor in re.findall(r'href="#(\w+)"', page):
        assert f'id="{anchor}"' in page
    assert 'class="absent"' not in page
    text = _text(page)
    reason = "collapse guard: effective_clusters 1.2 < 5"
    figures = ("91.2 %", "31.0 %", "27.0 %", "among 40 clips", "NMI", reason)
    figures += ("confused pairs", "middle frame: CAV-MAE's protocol", "Accuracy of each class")
    for expected in (*figures, "Fine-tuning", "c0ffee", "started 2026-11-20 21:00 UTC"):
        assert expected in text


def test_names_from_data_cannot_become_markup(whole_page: str) -> None:
    page = whole_page
    assert page.count("<script") == 3  # the data, the sounds and the page's own
    data = page.split('type="application/json">')[1].split("</script>")[0]
    assert CLASSES[7] in json.loads(data)["confusion"]["classes"]
    assert "fake &lt;run&gt;" in page


def test_frames_are_the_stores_own_jpegs(whole_page: str) -> None:
    page = whole_page
    shown = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="([^"]+)"', page)
    frames = [(data, about) for data, about in shown if not about.startswith("spectrogram")]
    assert len(shown) > 1.5 * len(frames)
    assert len(frames) > 60
    index = {clip_id: (label, at) for at, (clip_id, label, _) in enumerate(CLIPS)}
    for data, about in frames[:5] + frames[-5:]:
        clip_id = about.split(" · ")[0]
        label, position = index[clip_id]
        middle = _frame(label, position % (len(CLASSES) * PER_CLASS) + 1)
        assert base64.b64decode(data) == middle, clip_id


def test_cosines_do_not_depend_on_the_length_of_embeddings(run: Path) -> None:
    said = re.findall(r"cosine (-?[0-9.]+)", Path(write_report(run, with_sound=False)).read_text())
    file = run / "evaluation" / "embeddings.npz"
    with np.load(file) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    long = np.linspace(0.5, 3, len(kept["video"]), dtype=np.float32)[:, None]
    np.savez(file, **kept | {"video": kept["video"] * long, "audio": kept["audio"] * 2})
    again = Path(write_report(run, with_sound=False)).read_text()
    assert re.findall(r"cosine (-?[0-9.]+)", again) == said
    assert len(said) >= 40


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        ("*.jsonl", "No training curves"),
        ("rounds", "No clustering"),
        ("evaluation/confusion.npz", "was not fine-tuned"),
        ("evaluation/embeddings.npz", "No retrieval examples"),
    ],
)
def test_a_missing_part_is_left_out_with_a_line(run: Path, remove: str, said: str) -> None:
    for gone in run.glob(remove):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    page = Path(write_report(run, with_sound=False)).read_text()
    assert said in _text(page)
    assert page.count('class="absent"') == 1


def test_a_bare_run_folder_is_a_page_of_absences(tmp_path: Path) -> None:
    _write_json(tmp_path / "run.json", {"name": "bare"})
    page = Path(write_report(tmp_path)).read_text()
    assert "the run folder names no feature store" in _text(page)
    assert page.count('class="absent"') == 7


def test_a_page_shows_no_password(tmp_path: Path) -> None:
    server, store = "http://ada:open-sesame@mlflow:5000/x", "sftp://ada:open-sesame@disk/store"
    run = {"name": "bare", "mlflow": {"uri": server, "run_id": "abc"}, "store": {"uri": store}}
    _write_json(tmp_path / "run.json", run)
    _write_json(tmp_path / "results.json", {"store": {"uri": store}})
    (tmp_path / "config.yaml").write_text(f"tracking:\n  uri: {server}\n")
    page = Path(write_report(tmp_path)).read_text()
    assert "open-sesame" not in page
    shown = _text(page)
    assert shown.count("http://ada:***@mlflow:5000/x") == 2
    # The note on its frames, the pins, results.json.
    assert shown.count("sftp://ada:***@disk/store") == 3


def test_a_store_that_is_gone_costs_the_frames_only(run: Path) -> None:
    described = json.loads((run / "run.json").read_text())
    described["store"]["uri"] = str(run / "gone")
    (run / "run.json").write_text(json.dumps(described))
    page = Path(write_report(run, with_sound=False)).read_text()
    assert "Frames are left out" in _text(page)
    assert "<img" not in page
    assert "Most confused pairs" in page
    with pytest.raises(PipelineError, match="no feature store"):
        write_report(run, str(run / "gone"))


@pytest.mark.slow
def test_shards_that_are_gone_cost_the_frames_only(run: Path, tmp_path: Path) -> None:
    store = make_store(str(tmp_path / "store"))
    described = json.loads((run / "run.json").read_text())
    described["store"]["uri"] = store.uri
    (run / "run.json").write_text(json.dumps(described))
    shutil.rmtree(tmp_path / "store" / "features")
    page = Path(write_report(run, with_sound=False)).read_text()
    assert f"the feature store {store.uri} cannot be read now" in _text(page)
    assert "<img" not in page
    assert page.count('class="absent"') == 1
    with pytest.raises(PipelineError, match="is not there"):
        write_report(run, store.uri, with_sound=False)


def test_a_folder_without_a_run_or_with_a_broken_part_is_an_error(run: Path) -> None:
    with pytest.raises(TrainingError, match="no run folder"):
        write_report(run / "encoder")
    (run / "evaluation" / "confusion.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(TrainingError, match=r"confusion\.npz: cannot be read"):
        write_report(run)


def test_no_training_step_leaves_the_folder_but_the_report(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    report = Path(write_report(run, with_sound=False))
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} == {report}


def test_sound_is_of_the_source_or_says_that_it_is_synthesised(whole_page: str) -> None:
    page = whole_page
    sounds = json.loads(page.split('id="sounds" type="application/json">')[1].split("</script>")[0])
    buttons = re.findall(r'data-sound="([^"]+)" data-seconds="0.5" data-origin="(\w+)"', page)
    split = {clip_id: split for clip_id, _, split in CLIPS}
    assert {name for name, _ in buttons} == sounds.keys()
    assert len(sounds) > 60
    for clip_id, origin in buttons:  # The sources of the test clips are gone.
        assert origin == {"train": "source", "test": "synthesised"}[split[clip_id]]
    assert page.count(">synthesised</small>") == sum(o == "synthesised" for _, o in buttons)
    assert "its source is gone" in _text(page)
    assert "16 kHz" not in _text(page)
    assert "20 Hz to 8 kHz, mel scale" in _text(page)
    lengths = {}
    for clip_id in (name for name, _ in buttons[:40] + buttons[-1:]):
        with av.open(io.BytesIO(base64.b64decode(sounds[clip_id].split(",")[1]))) as container:
            audio = container.decode(audio=0)
            lengths[split[clip_id]] = sum(f.samples for f in audio) / 48000
    assert lengths == pytest.approx({"train": 1.5, "test": 0.5}, abs=0.06)


@pytest.mark.slow
def test_a_source_that_was_replaced_is_not_played(run: Path, tmp_path: Path) -> None:
    store = make_store(str(tmp_path / "store"))
    os.utime(tmp_path / "source.mp4", ns=(1, 1))
    page = Path(write_report(run, store.uri)).read_text()
    assert 'data-origin="source"' not in page
    assert "its source was replaced since" in _text(page)


def _relabelled(store: FeatureStore, label: str) -> None:
    """Another version, in which every clip is of one class."""
    clips = store.snapshot().clips
    at = clips.column_names.index("label")
    store.append(clips.set_column(at, "label", pa.array([label] * len(clips))), {})


def test_a_store_is_looked_at_in_the_version_that_the_run_read(run: Path, tmp_path: Path) -> None:
    """Wherever it lies, and however the path of the same place is written."""
    moved = make_store(str(tmp_path / "store"))
    _relabelled(moved, "of another version")
    described = json.loads((run / "run.json").read_text())
    for uri, asked in ((str(run / "gone"), moved.uri), (moved.uri, f"{tmp_path}/./store")):
        described["store"]["uri"] = uri
        (run / "run.json").write_text(json.dumps(described))
        page = Path(write_report(run, asked, with_sound=False)).read_text()
        assert "of another version" not in page
        assert 'class="absent"' not in page
    described["store"]["version"] = 99
    (run / "run.json").write_text(json.dumps(described))
    text = _text(Path(write_report(run, moved.uri, with_sound=False)).read_text())
    assert "version 2 of" in text
    assert "holds other clips than the run read" in text


def test_a_store_made_anew_in_its_place_is_said_to_hold_other_clips(
    run: Path, tmp_path: Path
) -> None:
    described = json.loads((run / "run.json").read_text())
    described["store"]["digest"] = "d1" * 32
    (run / "run.json").write_text(json.dumps(described))
    page = Path(write_report(run, with_sound=False)).read_text()
    assert "holds other clips than the run read" in _text(page)
    assert "of the run d1d1d1d1d1d1" in _text(page)


def test_results_of_other_weights_than_the_run_has_are_said_to_be(run: Path) -> None:
    said = "results are of other weights than the run has now (classifier of it came since)"
    assert said not in _text(Path(write_report(run, with_sound=False)).read_text())
    _write_json(run / "classifier" / "classifier.json", {"sha256": "3" * 64})
    assert said in _text(Path(write_report(run, with_sound=False)).read_text())


def test_of_a_runs_predictions_all_is_read_but_the_probabilities(run: Path) -> None:
    """57 MB of VGGSound's file."""
    names = pq.read_schema(run / "evaluation" / "predictions.parquet").names
    probabilities = {f"probabilities_{stream}" for stream in ("audio", "video", "fusion")}
    predictions = read_run(run).predictions
    assert predictions is not None
    assert set(names) - set(predictions.column_names) == probabilities


WIDTHS = (1920, 1280, 390)
SEEN = """(() => {
  const seen = (s) => [...document.querySelectorAll(s)].filter((e) => {
    const box = e.getBoundingClientRect();
    return box.width > 4 && box.height > 4 && getComputedStyle(e).visibility === "visible";
  }).length;
  return {
    drawn: document.documentElement.dataset.drawn,
    headings: seen("h1, h2"), tiles: seen(".tile"), tables: seen("table"), nav: seen("nav a"),
    curves: [...document.querySelectorAll(".chart path")]
      .filter((p) => p.getTotalLength() > 20).length,
    panels: seen(".chart svg"), bad: [...document.querySelectorAll("svg *")].filter((e) =>
      [...e.attributes].some((a) => /NaN|Infinity/.test(a.value))).length,
    images: document.images.length,
    broken: [...document.images].filter((i) => !i.complete || !i.naturalWidth).length,
    cards: seen(".pair") + seen(".cluster") + seen(".query"),
  };
})()"""


@pytest.fixture(scope="module")
def page(whole_page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(whole_page)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_browser_shows_every_part_without_an_error(
    browser: Browser, page: Path, width: int
) -> None:
    browser.open(page, width)
    report = browser.eval(SEEN)
    assert browser.problems == []
    assert report["drawn"] == "true"
    assert report["headings"] == 8
    assert report["tiles"] == 6
    assert report["nav"] == 7
    assert report["tables"] >= 5
    assert report["panels"] >= 11
    assert report["curves"] >= report["panels"]
    assert report["bad"] == 0
    assert report["images"] > 120
    assert report["broken"] == 0
    assert report["cards"] >= 7 + 10 + 8
    assert browser.eval(CUT_OFF) == []


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_read(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, 1280, dark=dark)
    browser.eval("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.eval(FAINT) == []
    is_dark = browser.eval("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert is_dark == dark


@pytest.mark.browser
def test_what_a_screen_reader_needs_is_there(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    assert browser.eval(NAMELESS) == []
    assert (
        browser.eval("[...document.querySelectorAll('body > :is(main,nav,header,footer)')].length")
        == 4
    )
    levels = browser.eval("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert browser.eval("document.documentElement.lang") == "en"


@pytest.mark.browser
def test_browser_answers_the_pointer_and_switches_streams(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    before = browser.eval("document.querySelector('#heat canvas').toDataURL()")
    browser.eval("document.querySelector('[data-stream=audio]').click()")
    after = browser.eval("document.querySelector('#heat canvas').toDataURL()")
    assert before != after
    assert len(after) > 2000
    point = """((s, right) => { const node = document.querySelector(s);
      const box = node.getBoundingClientRect(), middle = box.left + box.width / 2;
      node.dispatchEvent(new PointerEvent("pointermove",
        { clientX: right ? box.right - 8 : middle, clientY: box.top + 8 }));
      const tip = document.getElementById("tip");
      return tip.style.visibility + " " + tip.textContent; })"""
    curves = browser.eval(point + "('[data-panel] svg', false)")
    assert re.match(r"visible step \d+", curves)
    assert "loss_instance" in curves
    assert re.search(r"taken for .*: \d+ of 16", browser.eval(point + "('#heat canvas', true)"))


@pytest.mark.browser
def test_the_keyboard_finds_a_class_and_walks_through_the_map(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    said = "document.getElementById('cell').textContent"
    browser.eval("document.getElementById('find').focus()")
    browser.call("Input.insertText", text="rain")
    assert browser.eval(said).startswith("fusion: rain: right, ")
    assert "taken for it" in browser.eval("document.getElementById('of-class').textContent")
    browser.eval("document.querySelector('#heat canvas').focus()")
    browser.press("ArrowRight")
    assert re.match(r"fusion: rain taken for .*: \d+ of 16", browser.eval(said))
    browser.press("n")
    worst = browser.eval(said)
    browser.press("n")
    second = browser.eval(said)
    browser.press("p")
    assert browser.eval(said) == worst != second
    span = "+document.querySelector('#heat canvas').dataset.view.split(' ')[2]"
    browser.press("0")
    whole = browser.eval(span)
    browser.press("+")
    assert browser.eval(span) < whole == len(CLASSES)


@pytest.mark.browser
def test_enter_on_a_spectrogram_plays_it(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    browser.eval("document.querySelector('button.sound').focus()")
    browser.press("Enter")
    heard = """new Promise((done) => {
      const check = () => player.currentTime > 0.1 ? done(true) : setTimeout(check, 20);
      setTimeout(() => done(String(player.error || "silent")), 5000); check(); })"""
    assert browser.eval(heard) is True
    pressed = "document.querySelector('button.sound').getAttribute('aria-pressed')"
    assert browser.eval(pressed) == "true"
    browser.press("Enter")
    assert browser.eval(pressed) == "false"
    assert browser.problems == []


@pytest.mark.browser
def test_what_is_cut_off_faint_or_broken_would_be_seen(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    """The negative control of the browser tests."""
    broken = page.read_text().replace('"use strict";', '"use strict"; nowhere.x;')
    style = "<style>.tile { width: 30px; overflow: hidden } p.lead { color: #999 }</style>"
    broken = broken.replace("</head>", style + "</head>")
    broken = broken.replace('<button data-zoom="all">all</button>', "<button></button>")
    (tmp_path / "page.html").write_text(broken)
    browser.open(tmp_path / "page.html", 1280)
    assert any("nowhere is not defined" in problem for problem in browser.problems)
    browser.problems.clear()
    assert any("tile" in found for found in browser.eval(CUT_OFF))
    assert any("lead" in found for found in browser.eval(FAINT))
    assert any("BUTTON" in found for found in browser.eval(NAMELESS))
