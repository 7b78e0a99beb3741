"""A run folder of VGGSound's size as the trainer leaves it, in half a minute and without a model.

Knows nothing of the page made of it. Invariant: equal sizes give equal files. Its 199,000 clips
share the features of a few shards and the sources of a few files: a report reads what it shows.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import simplejpeg
from support.run_parts import curves, publish_round, write_metrics, write_predicted

from pipeline.config import FeatureSpec
from pipeline.source.files import local_file
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.shards import ShardWriter
from pipeline.store.store import FeatureStore
from pipeline.synth import CLASSES, write_clips
from training.data.rows import clip_keys

STREAMS = ("audio", "video", "fusion")
_DOES = (
    "playing", "people", "female singing", "child speech, kid", "electric shaver, electric razor",
    "opening or closing", "male", "dog", "sharpening", "using",
)  # fmt: skip
_WHAT = (
    "violin", "bagpipes", "car electric windows", "sewing machine", "cattle, bovinae cowbell",
    "barking", "ukulele", "noodle eating", "steelpan and glockenspiel", "wind chime", "knife",
)  # fmt: skip


class Size(NamedTuple):
    """How much of everything; the defaults are VGGSound's."""

    classes: int = 309
    train: int = 183_730
    test: int = 15_446
    clusters: int = 600
    rounds: int = 30
    lines: int = 100_000
    width: int = 768
    shards: int = 8
    shard_rows: int = 64


class _Clips(NamedTuple):
    ids: list[str]
    labels: np.ndarray
    is_test: np.ndarray


VGGSOUND = Size()


def make_full_run(folder: Path, size: Size = VGGSOUND) -> Path:
    """Store, sources and run folder below `folder`; returns the run folder."""
    names = class_names(size.classes)
    rng = np.random.default_rng(0)
    n = size.train + size.test
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))
    ytids = letters[rng.integers(64, size=(n, 11))].view("U11")[:, 0]
    ids = [f"{y}_{s:06d}" for y, s in zip(ytids, rng.integers(0, 600, n), strict=True)]
    is_test = np.arange(n) >= size.train
    clips = _Clips(ids, rng.integers(size.classes, size=n), is_test)
    store = _store(folder, clips, names, size)
    run = folder / "run"
    run.mkdir()
    _metrics(run, size)
    _rounds(run, clips, size)
    _evaluation(run, clips, names, size)
    _json(run, store, names, size)
    return run


def class_names(n: int) -> list[str]:
    """Names as long and as full of commas as VGGSound's."""
    pairs = [f"{does} {what}" for what in _WHAT for does in _DOES]
    return sorted(
        pairs[k % len(pairs)] + (f" {k // len(pairs)}" * (k >= len(pairs))) for k in range(n)
    )


def _store(folder: Path, clips: _Clips, names: list[str], size: Size) -> FeatureStore:
    rng = np.random.default_rng(1)
    spec = FeatureSpec(n_frames=1)
    store = FeatureStore.create(str(folder / "store"), spec)
    shards = [f"features/part-run-{k:06d}-0.parquet" for k in range(size.shards)]
    for name in shards:
        writer = ShardWriter(store.location, name, spec)
        for _ in range(size.shard_rows):
            writer.add(_features(rng, spec))
        writer.publish()
    write_clips(folder / "clips", len(CLASSES), 0, seed=0)
    files = [local_file(str(p), p.stat()) for p in sorted((folder / "clips/videos").iterdir())]
    k = np.arange(len(clips.ids))
    columns: dict[str, Any] = {
        name: pa.nulls(len(k), CLIPS_SCHEMA.field(name).type) for name in CLIPS_SCHEMA.names
    }
    for name in ("uri", "size", "mtime_ns", "fp_kind", "fp"):
        columns[name] = np.array([getattr(f, name) for f in files])[k % len(files)]
    columns |= {"clip_id": clips.ids, "row_key": clips.ids, "label": np.array(names)[clips.labels]}
    columns |= {"split": np.where(clips.is_test, "test", "train"), "status": ["ok"] * len(k)}
    columns |= {"spec_hash": [spec.spec_hash()] * len(k), "row": k // size.shards % size.shard_rows}
    columns["shard"] = np.array(shards)[k % size.shards]
    store.append(pa.table(columns).cast(CLIPS_SCHEMA), {})
    return store


def _features(rng: np.random.Generator, spec: FeatureSpec) -> dict[str, Any]:
    """A picture with as much in it as a real one (20 KB), and a sound of a few harmonics."""
    side = spec.frame_size
    blocks = rng.integers(0, 200, (8, 8, 3)).repeat(side // 8, 0).repeat(side // 8, 1)
    image = np.clip(blocks + rng.normal(0, 9, (side, side, 1)), 0, 255).astype(np.uint8)
    t, m = np.mgrid[0 : spec.fbank_frames, 0 : spec.n_mels]
    pitch = rng.uniform(10, 60) + 6 * np.sin(t / rng.uniform(20, 200))
    tones = sum(6 * np.exp(-(((m - k * pitch) / 2.0) ** 2)) for k in (1, 1.5, 2))
    fbank = (tones - 9 + rng.normal(0, 0.7, t.shape)).astype(np.float16)
    frames = [simplejpeg.encode_jpeg(image, quality=95, colorsubsampling="420")]
    sound = {"fbank": fbank.tobytes(), "fbank_frames": 998}
    return {"clip_id": "x", "row_key": "x", "frames": frames, "frame_ts_ms": [5000], **sound}


def _metrics(run: Path, size: Size) -> None:
    """Lines of the names that a pretraining of VGGSound logs."""
    rng = np.random.default_rng(2)
    t_L = np.linspace(0, 1, size.lines)
    logged = {n: x_L * rng.uniform(0.9, 1.1, len(t_L)) for n, x_L in curves(t_L).items()}
    write_metrics(run / "metrics.jsonl", logged)


def _rounds(run: Path, clips: _Clips, size: Size) -> None:
    rng = np.random.default_rng(3)
    train = np.flatnonzero(~clips.is_test)
    keys_N, truth_N = clip_keys([clips.ids[k] for k in train]), clips.labels[train]
    for number in range(1, size.rounds + 1):
        labels = {}
        for stream in STREAMS[:2]:
            noise_N = rng.integers(size.clusters, size=len(truth_N))
            is_right_N = rng.random(len(truth_N)) < 0.3 + number / 60
            labels[stream] = np.where(is_right_N, truth_N, noise_N)
        step = 10 * size.lines * number // (size.rounds + 1)
        publish_round(run, number, step, keys_N, labels, n_clusters=size.clusters, width=256)


def _evaluation(run: Path, clips: _Clips, names: list[str], size: Size) -> None:
    """Classes come in groups of four that are taken for each other."""
    rng = np.random.default_rng(4)
    test = np.flatnonzero(clips.is_test)
    truth_M = clips.labels[test]
    group = rng.permutation(size.classes).argsort() // 4
    mates = [np.flatnonzero(group == group[k]) for k in range(size.classes)]
    predicted = {}
    for stream, hit in zip(STREAMS, (0.5, 0.45, 0.65), strict=True):
        near_M = np.array([rng.choice(mates[k]) for k in truth_M])
        far_M = rng.integers(size.classes, size=len(truth_M))
        draw_M = rng.random(len(truth_M))
        wrong_M = np.where(draw_M < hit + 0.25, near_M, far_M)
        predicted[stream] = np.where(draw_M < hit, truth_M, wrong_M)
    sure_M = rng.uniform(0.2, 1, len(truth_M))
    shape = (len(test), size.width)
    vectors = {s: rng.normal(size=shape).astype(np.float32) for s in STREAMS}
    ids = [clips.ids[k] for k in test]
    write_predicted(run, ids, names, truth_M, predicted, sure_M=sure_M, embeddings=vectors)


def _json(run: Path, store: FeatureStore, names: list[str], size: Size) -> None:
    pinned = {"uri": store.uri, "version": 1, "digest": store.snapshot(1).digest}
    described = {"name": "vggsound-full", "config_hash": "c0ffee", "store": pinned}
    described |= {"started": "2026-11-20T21:00:00Z", "versions": {"torch": "2.11.0"}}
    (run / "run.json").write_text(json.dumps(described))
    by_stream = {"audio": 0.512, "video": 0.464, "fusion": 0.655}
    results: dict[str, Any] = {"encoder": "base", "n_train": size.train, "n_test": size.test}
    results |= {"store": pinned, "top1": by_stream, "top5": by_stream, "map": by_stream}
    results |= {name: by_stream | {"audio_video": 0.6} for name in ("probe", "knn")}
    results["pair_accuracy"] = by_stream
    ranks = {f"{way}_r{k}": 0.1 * k for way in ("a2v", "v2a") for k in (1, 5, 10)}
    results["retrieval"] = ranks | {"n_clips": 1545.0, "a2v_median_rank": 41.5}
    results["class_accuracy"] = [{"class": c, "n_clips": 50, **by_stream} for c in names]
    results["seconds"] = {"ingest": 91234.0, "pretrain": 286000.0, "finetune": 31000.0}
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.yaml").write_text("seed: 0\nencoder:\n  preset: base\n")
