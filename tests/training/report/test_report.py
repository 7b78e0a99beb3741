"""The report of a run: what is on the page, what is left out, and that a browser can show it."""

import base64
import functools
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

from clustering.rounds.files import publish
from clustering.rounds.protocol import HeadLabels, PublishedRound
from pipeline.config import FeatureSpec
from pipeline.errors import PipelineError
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.shards import ShardWriter
from pipeline.store.store import FeatureStore
from training.data.rows import clip_keys
from training.errors import TrainingError
from training.report.page import write_report

CLASSES = [
    "playing violin", "playing cello", "dog barking", "wolf howling", "church bell", "alarm clock",
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
    """A real store of two shards; clips of every class and split."""
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
            rows.append({name: None for name in CLIPS_SCHEMA.names} | row | state)
        shard.publish()
    store.append(pa.Table.from_pylist(rows, CLIPS_SCHEMA), {})
    return store


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _metrics(folder: Path) -> None:
    lines = []
    for step in range(10, 1210, 10):
        t = step / 1200
        line = {"step": step, "epoch": 12 * t, "time": 1.76e9 + step / 9}
        line |= {"loss": 5.5 * np.exp(-3 * t) + 0.9, "loss_instance": 5.2 * np.exp(-3 * t) + 0.4}
        line |= {"loss_intra": 1.1 * np.exp(-2 * t), "accuracy_instance": 1 - np.exp(-4 * t)}
        line |= {"lr": 2e-4 * min(1, 8 * t) * (1 - 0.9 * t), "grad_norm": 3 * np.exp(-t) + 0.2}
        line |= {"clips_per_s": 830 + 40 * np.sin(step / 30), "time/data_wait": 0.002}
        line |= {"time/forward": 0.11, "time/backward": 0.19, "time/loss": 0.004}
        line |= {"time/push": 0.003, "time/stall": 0.001}
        if step > 400:
            line |= {"loss_class_alignment": 1.3 * np.exp(-t), "loss_confusion": 0.9 * np.exp(-t)}
            line |= {"labelled_frac": min(1, (step - 400) / 300), "loss_reconstruction": None}
            line |= {"confusion/mean_offdiagonal": 0.05 * np.exp(-t), "clustering/nmi": 0.6}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    losses = [(step, 2.3 * np.exp(-step / 90)) for step in range(10, 300, 10)]
    tuned = [
        {"step": s, "time": 1.77e9, "finetune/loss": x, "finetune/lr": 1e-4} for s, x in losses
    ]
    (folder / "finetune.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tuned))


def _rounds(folder: Path) -> None:
    rng = np.random.default_rng(1)
    train = [(clip_id, label) for clip_id, label, split in CLIPS if split == "train"]
    keys = clip_keys([clip_id for clip_id, _ in train])
    order = np.argsort(keys)
    for number in range(1, 5):
        ok = number != 3
        health = {"inertia": 140.0 / number, "iterations": 12, "n_empty": 0, "size_min": 9}
        health |= {"size_max": 31, "effective_clusters": 8 + number / 2, "churn": 0.4 / number}
        health |= {"coverage": 0.9 + number / 50, "seconds": 0.8}
        reason = "" if ok else "collapse guard: effective_clusters 1.2 < 5"
        heads = []
        if ok:
            labels = [label if rng.random() < 0.8 else TWIN.get(label, 9) for _, label in train]
            labels_N = np.array(labels, np.int32)[order]
            prototypes = {"audio": np.eye(10, WIDTH, dtype=np.float32)}
            confusion_KK = np.eye(10, dtype=np.float32)
            heads = [
                HeadLabels("head0", ("audio",), keys[order], labels_N, prototypes, confusion_KK)
            ]
        publish(
            str(folder / "rounds"), PublishedRound(number, 300 * number, ok, reason, heads, health)
        )


def _evaluation(folder: Path) -> None:
    rng = np.random.default_rng(2)
    test = [(clip_id, label) for clip_id, label, split in CLIPS if split == "test"]
    truth = np.array([label for _, label in test])
    hit = {"audio": 0.7, "video": 0.75, "fusion": 0.9}
    predicted, counts = {}, {}
    for stream, share in hit.items():
        wrong = np.array([TWIN.get(int(label), (int(label) + 1) % 10) for label in truth])
        predicted[stream] = np.where(rng.random(len(truth)) < share, truth, wrong)
        matrix = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
        np.add.at(matrix, (truth, predicted[stream]), 1)
        counts[stream] = matrix
    path = folder / "evaluation"
    path.mkdir()
    np.savez(path / "confusion.npz", classes=np.array(CLASSES), **counts)
    columns = {"clip_id": [clip_id for clip_id, _ in test], "label": truth}
    columns |= {f"pred_{stream}": values for stream, values in predicted.items()}
    columns |= {"split": ["test"] * len(test), "cluster": np.full(len(test), -100, np.int32)}
    columns["p_fusion"] = rng.uniform(0.4, 1, len(test)).astype(np.float32)
    pq.write_table(pa.table(columns), path / "predictions.parquet")
    vectors = {}
    for stream in hit:
        x = np.eye(len(CLASSES), WIDTH)[truth] + rng.normal(0, 0.3, (len(truth), WIDTH))
        vectors[stream] = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    np.savez(path / "embeddings.npz", clip_ids=np.array([c for c, _ in test]), **vectors)


def make_run(folder: Path, store_uri: str) -> Path:
    """A run folder with every part, as the trainer leaves it."""
    folder.mkdir(parents=True)
    _metrics(folder)
    _rounds(folder)
    _evaluation(folder)
    _write_json(folder / "encoder" / "encoder.json", {"config": {}})
    store = {"uri": store_uri, "version": 1, "digest": "d1" * 32}
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


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the whole run, to take parts from."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def _text(page: str) -> str:
    """What a reader sees without scripts."""
    body = page[page.index("<body>") : page.index("<script")]
    return html.unescape(re.sub(r"<[^>]+>", " ", body))


def test_page_is_whole_and_fetches_nothing(whole_run: Path) -> None:
    page = Path(write_report(whole_run)).read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["']?(?!data:|#)[^"'>]""", page)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page)
    for anchor in re.findall(r'href="#(\w+)"', page):
        assert f'id="{anchor}"' in page
    assert 'class="absent"' not in page
    text = _text(page)
    reason = "collapse guard: effective_clusters 1.2 < 5"
    figures = ("91.2 %", "31.0 %", "27.0 %", "among 40 clips", "NMI", reason)
    figures += ("confused pairs", "middle frame (CAV-MAE's protocol)", "Accuracy of each class")
    for expected in (*figures, "Fine-tuning", "c0ffee", "started 2026-11-20 21:00 UTC"):
        assert expected in text


def test_names_from_data_cannot_become_markup(whole_run: Path) -> None:
    page = Path(write_report(whole_run)).read_text()
    assert page.count("<script") == 2  # the data and the page's own
    data = page.split('type="application/json">')[1].split("</script>")[0]
    assert CLASSES[7] in json.loads(data)["confusion"]["classes"]
    assert "fake &lt;run&gt;" in page


def test_frames_are_the_stores_own_jpegs(whole_run: Path) -> None:
    page = Path(write_report(whole_run)).read_text()
    shown = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="([^"]+)"', page)
    frames = [(data, about) for data, about in shown if not about.startswith("spectrogram")]
    assert len(frames) > 60
    index = {clip_id: (label, at) for at, (clip_id, label, _) in enumerate(CLIPS)}
    for data, about in frames[:5] + frames[-5:]:
        clip_id = about.split(" · ")[0]
        label, position = index[clip_id]
        middle = _frame(label, position % (len(CLASSES) * PER_CLASS) + 1)
        assert base64.b64decode(data) == middle, clip_id


def test_cosines_do_not_depend_on_the_length_of_embeddings(run: Path) -> None:
    said = re.findall(r"cosine (-?[0-9.]+)", Path(write_report(run)).read_text())
    file = run / "evaluation" / "embeddings.npz"
    with np.load(file) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    long = np.linspace(0.5, 3, len(kept["video"]), dtype=np.float32)[:, None]
    np.savez(file, **kept | {"video": kept["video"] * long, "audio": kept["audio"] * 2})
    assert re.findall(r"cosine (-?[0-9.]+)", Path(write_report(run)).read_text()) == said
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
    page = Path(write_report(run)).read_text()
    assert said in _text(page)
    assert page.count('class="absent"') == 1


def test_a_bare_run_folder_is_a_page_of_absences(tmp_path: Path) -> None:
    _write_json(tmp_path / "run.json", {"name": "bare"})
    page = Path(write_report(tmp_path)).read_text()
    assert "the run folder names no feature store" in _text(page)
    assert page.count('class="absent"') == 7


def test_a_store_that_is_gone_costs_the_frames_only(run: Path) -> None:
    described = json.loads((run / "run.json").read_text())
    described["store"]["uri"] = str(run / "gone")
    (run / "run.json").write_text(json.dumps(described))
    page = Path(write_report(run)).read_text()
    assert "Frames are left out" in _text(page)
    assert "<img" not in page
    assert "Most confused pairs" in page
    with pytest.raises(PipelineError, match="no feature store"):
        write_report(run, str(run / "gone"))


def test_a_folder_without_a_run_or_with_a_broken_part_is_an_error(run: Path) -> None:
    with pytest.raises(TrainingError, match="no run folder"):
        write_report(run / "encoder")
    (run / "evaluation" / "confusion.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(TrainingError, match=r"confusion\.npz: cannot be read"):
        write_report(run)


def test_no_training_step_leaves_the_folder_but_the_report(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    report = Path(write_report(run))
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} == {report}


PROBE_HEAD = """<script>
window.problems = [];
addEventListener("error", (e) => problems.push(String(e.message)));
addEventListener("unhandledrejection", (e) => problems.push(String(e.reason)));
addEventListener("securitypolicyviolation", (e) => problems.push("policy: " + e.blockedURI));
</script>"""
PROBE_TAIL = """<script>
addEventListener("load", () => setTimeout(() => {
  const seen = (s) => [...document.querySelectorAll(s)].filter((e) => {
    const box = e.getBoundingClientRect();
    return box.width > 4 && box.height > 4 && getComputedStyle(e).visibility === "visible";
  }).length;
  const canvas = document.querySelector("#heat canvas");
  const pixels = () => canvas.toDataURL().length;
  const fusion = pixels();
  const before = canvas.toDataURL();
  document.querySelector('[data-stream="audio"]').click();
  const switched = before !== canvas.toDataURL();
  const chart = document.querySelector("[data-panel] svg"), box = chart.getBoundingClientRect();
  const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
  chart.dispatchEvent(new PointerEvent("pointermove", at));
  const tip = document.getElementById("tip");
  const tipText = tip.style.visibility + " " + tip.textContent;
  const map = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new PointerEvent("pointermove",
    { clientX: map.left + map.width - 8, clientY: map.top + 8 }));
  parent.postMessage({
    width: innerWidth, problems, drawn: document.documentElement.dataset.drawn,
    overflow: document.documentElement.scrollWidth - innerWidth,
    headings: seen("h1, h2"), tiles: seen(".tile"), tables: seen("table"), nav: seen("nav a"),
    curves: [...document.querySelectorAll(".chart path")]
      .filter((p) => p.getTotalLength() > 20).length,
    panels: seen(".chart svg"), bad: [...document.querySelectorAll("svg *")].filter((e) =>
      [...e.attributes].some((a) => /NaN|Infinity/.test(a.value))).length,
    images: document.images.length,
    broken: [...document.images].filter((i) => !i.complete || !i.naturalWidth).length,
    cards: seen(".pair") + seen(".cluster") + seen(".query"),
    blank: fusion < 2000, switched, tipText, mapTip: tip.textContent,
    cut: [...document.querySelectorAll("#results .scroll, .cluster header b")]
      .filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent),
  }, "*");
}, 300));
</script>"""
FRAME = """<body><script>
const found = [];
addEventListener("message", (e) => { found.push(e.data);
  document.getElementById("found").textContent = JSON.stringify(found); });
</script><pre id="found"></pre>
<iframe src="probed.html" width="1920" height="1080"></iframe>
<iframe src="probed.html" width="1280" height="900"></iframe>
<iframe src="probed.html" width="390" height="844"></iframe></body>"""


@functools.cache
def _browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found:
        return found
    if os.environ.get("DICCAE_REQUIRE_BROWSER") == "1":
        pytest.fail("DICCAE_REQUIRE_BROWSER=1 and no chromium or google-chrome on PATH")
    pytest.skip("no chromium or google-chrome on PATH")


def _open(page: Path, profile: Path) -> str:
    """The DOM after its scripts ran."""
    command = [_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--window-size=1400,1000", "--dump-dom"]
    command += ["--virtual-time-budget=8000", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def seen(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What a browser made of the page, by the width of its window."""
    _browser()
    folder = tmp_path_factory.mktemp("browser")
    page = Path(write_report(whole_run)).read_text()
    page = page.replace("<head>", "<head>" + PROBE_HEAD).replace("</body>", PROBE_TAIL + "</body>")
    (folder / "probed.html").write_text(page)
    (folder / "frame.html").write_text(FRAME)
    dom = _open(folder / "frame.html", folder / "profile")
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    return {report["width"]: report for report in json.loads(html.unescape(found.group(1)))}


@pytest.mark.browser
@pytest.mark.parametrize("width", [1920, 1280, 390])
def test_browser_shows_every_part_without_an_error(
    seen: dict[int, dict[str, Any]], width: int
) -> None:
    report = seen[width]
    assert report["problems"] == []
    assert report["drawn"] == "true"
    assert report["overflow"] <= 0
    assert report["headings"] == 8
    assert report["tiles"] == 6
    assert report["nav"] == 7
    assert report["tables"] >= 5
    assert report["panels"] >= 11
    assert report["curves"] >= report["panels"]
    assert report["bad"] == 0
    assert report["images"] > 60
    assert report["broken"] == 0
    assert report["cards"] >= 6 + 10 + 8
    if width > 390:  # A telephone scrolls a table of seven columns; its first one stays.
        assert report["cut"] == []


@pytest.mark.browser
def test_browser_answers_the_pointer_and_switches_streams(seen: dict[int, dict[str, Any]]) -> None:
    report = seen[1280]
    assert not report["blank"]
    assert report["switched"]
    assert re.match(r"visible step \d+", report["tipText"])
    assert "loss_instance" in report["tipText"]
    assert re.search(r"taken for .*: \d+ of 16", report["mapTip"])


@pytest.mark.browser
def test_a_script_error_would_be_seen(whole_run: Path, tmp_path: Path) -> None:
    """The negative control of the browser tests."""
    page = Path(write_report(whole_run)).read_text()
    broken = page.replace('"use strict";', '"use strict"; document.body.dataset.x = nowhere.x;')
    broken = broken.replace("<head>", "<head>" + PROBE_HEAD)
    shown = "<script>document.title = JSON.stringify(problems);</script></body>"
    (tmp_path / "page.html").write_text(broken.replace("</body>", shown))
    assert "nowhere is not defined" in _open(tmp_path / "page.html", tmp_path / "profile")
