"""A run folder of VGGSound's size as the trainer leaves it, in half a minute and without a model.

Knows nothing of the page made of it. Invariant: equal sizes give equal files. Its 199,000 clips
share the features of a few shards and the sources of a few files: a report reads what it shows.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from clustering.rounds.files import publish
from clustering.rounds.protocol import HeadLabels, PublishedRound
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
    t = np.linspace(0, 1, size.lines)
    falling = ("loss", "loss_instance", "loss_intra", "loss_class_alignment", "loss_confusion")
    columns = {name: (5 - k) * np.exp(-3 * t) + 0.1 for k, name in enumerate(falling)}
    columns |= {"lr": 1e-4 * (1 - t), "grad_norm": 1 + 0 * t, "accuracy_instance": 1 - np.exp(-t)}
    columns |= {"clips_per_s": 800 + 0 * t, "labelled_frac": np.minimum(1, 3 * t)}
    parts = ("data_wait", "forward", "loss", "gather", "backward", "update", "push", "stall")
    columns |= {f"time/{part}": 0.05 + 0 * t for part in parts}
    columns["confusion/mean_offdiagonal"] = 0.05 * np.exp(-t)
    noisy = {name: x * rng.uniform(0.9, 1.1, len(t)) for name, x in columns.items()}
    noisy["world_size"], noisy["attempt"] = np.full(len(t), 8), np.ones(len(t))
    line = ", ".join(f'"{name}": %.6g' for name in noisy)
    values = np.stack([*noisy.values()], axis=1).tolist()
    with (run / "metrics.jsonl").open("w") as file:
        for k, row in enumerate(values):
            file.write(f'{{"step": {10 * k + 10}, "time": {1.7e9 + k}, {line}}}\n' % tuple(row))


def _rounds(run: Path, clips: _Clips, size: Size) -> None:
    rng = np.random.default_rng(3)
    train = np.flatnonzero(~clips.is_test)
    keys = clip_keys([clips.ids[k] for k in train])
    order = np.argsort(keys)
    truth = clips.labels[train][order]
    eye = np.eye(size.clusters, dtype=np.float32)
    for number in range(1, size.rounds + 1):
        heads = []
        for stream in STREAMS[:2]:
            noise = rng.integers(size.clusters, size=len(truth))
            labels = np.where(rng.random(len(truth)) < 0.3 + number / 60, truth, noise)
            labels = labels.astype(np.int32)
            prototypes = {stream: rng.normal(size=(size.clusters, 256)).astype(np.float32)}
            heads.append(HeadLabels(stream, (stream,), keys[order], labels, prototypes, eye))
        health = {"inertia": 1e5 / number, "iterations": 12.0, "n_empty": 0.0, "size_min": 31.0}
        health |= {
            "size_max": 1312.0,
            "effective_clusters": 510 + number / 2,
            "churn": 0.4 / number,
        }
        health |= {"coverage": 1.0, "mean_cosine": 0.2, "age_mean": 812.5, "seconds": 61.2}
        step = 10 * size.lines * number // (size.rounds + 1)
        publish(str(run / "rounds"), PublishedRound(number, step, True, "", heads, health))


def _evaluation(run: Path, clips: _Clips, names: list[str], size: Size) -> None:
    """Classes come in groups of four that are taken for each other."""
    rng = np.random.default_rng(4)
    test = np.flatnonzero(clips.is_test)
    truth = clips.labels[test]
    group = rng.permutation(size.classes).argsort() // 4
    mates = [np.flatnonzero(group == group[k]) for k in range(size.classes)]
    columns: dict[str, Any] = {"clip_id": [clips.ids[k] for k in test], "label": truth}
    counts: dict[str, Any] = {}
    for stream, hit in zip(STREAMS, (0.5, 0.45, 0.65), strict=True):
        near = np.array([rng.choice(mates[k]) for k in truth])
        far = rng.integers(size.classes, size=len(truth))
        draw = rng.random(len(truth))
        predicted = np.where(draw < hit, truth, np.where(draw < hit + 0.25, near, far))
        columns[f"pred_{stream}"] = predicted
        counts[stream] = np.zeros((size.classes, size.classes), np.int64)
        np.add.at(counts[stream], (truth, predicted), 1)
    columns["p_fusion"] = rng.uniform(0.2, 1, len(truth)).astype(np.float32)
    columns |= {"split": ["test"] * len(test), "cluster": np.full(len(test), -100, np.int32)}
    path = run / "evaluation"
    path.mkdir()
    pq.write_table(pa.table(columns), path / "predictions.parquet")
    np.savez_compressed(path / "confusion.npz", classes=np.array(names), **counts)
    shape = (len(test), size.width)
    vectors: dict[str, Any] = {s: rng.normal(size=shape).astype(np.float32) for s in STREAMS}
    np.savez(path / "embeddings.npz", clip_ids=np.array(columns["clip_id"]), **vectors)


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
