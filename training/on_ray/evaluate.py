"""What a run is worth: outputs of its models on clips it never saw to `results.json`.

Composes inference and the pure metrics of training.evaluation; knows nothing of the command line.
Invariant: the test split chooses nothing (no epoch, no pair, no threshold), and the number of clips
tested stands beside every result.

Shapes: N train and M test clips, C classes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from training.config import STREAMS, TrainingConfig
from training.data.rows import RowIndex
from training.errors import TrainingError
from training.evaluation.metrics import (
    confusion_counts,
    mean_average_precision,
    most_confused_pairs,
    topk_accuracy,
)
from training.evaluation.probes import knn_probe, linear_probe
from training.evaluation.retrieval import class_retrieval, retrieval, subset_per_class
from training.on_ray.inference import Outputs, Part, run_parts, unit

BOTH_SIDES = "audio_video"
"""Probe of audio and video side by side: fair to encoders whose fusion pass was never trained."""

_WORST_PAIRS = 10


def evaluate(
    config: TrainingConfig,
    train: RowIndex,
    test: RowIndex,
    out: Path,
    clusters: dict[str, int],
) -> dict[str, Any]:
    """Evaluate the encoder, and the classifier if there is one, of a run folder.

    Writes `evaluation/` (predictions, confusion counts, embeddings).
    Args: test: the clips of `evaluate.split`. clusters: last pseudo-label by clip id, for the
        predictions table.
    Returns: the accuracies, as fractions, by the keys of `results.json`.
    Raises: TrainingError if the run folder has no encoder.
    """
    encoder, classifier = str(out / "encoder"), str(out / "classifier")
    if not (out / "encoder" / "encoder.json").exists():
        raise TrainingError(f"{out}: no encoder/ in this run folder; run diccae pretrain first")
    has_classifier = (out / "classifier" / "classifier.json").exists()
    data, scale, frames = config.data, config.scale, config.evaluate.frames
    parts = [Part(test), Part(train, classify=False)]
    models = (encoder, classifier if has_classifier else None)
    on_test, on_train = run_parts(parts, *models, data, scale, frames)
    split = config.evaluate.split
    results: dict[str, Any] = {"n_train": len(train), "n_test": len(test), "split": split}
    results |= _probes(config, train, test, on_train, on_test)
    space = embedding_space(config)
    results["retrieval"] = _retrieval(config, test, on_test, space)
    scores: dict[str, NDArray] = {s: on_test[f"p.{s}"] for s in STREAMS if f"p.{s}" in on_test}
    if not scores:
        scores = results["probe_scores"]
    results |= _accuracies(scores, test) if has_classifier else {}
    del results["probe_scores"]
    results["confusion"] = _confusion(scores, test)
    _write(out / "evaluation", test, split, scores, on_test, space, clusters)
    return results


def embedding_space(config: TrainingConfig) -> str:
    """Embeddings that were trained to match across modalities: `h`, or `z` without heads."""
    return "z" if config.loss.instance_on == "z" else "h"


def _accuracies(scores: dict[str, NDArray], test: RowIndex) -> dict[str, Any]:
    labels, k = test.labels_N, min(5, len(test.classes))
    return {
        "top1": {s: topk_accuracy(x, labels, 1) for s, x in scores.items()},
        "top5": {s: topk_accuracy(x, labels, k) for s, x in scores.items()},
        "map": {s: mean_average_precision(x, labels) for s, x in scores.items()},
    }


def _probes(
    config: TrainingConfig, train: RowIndex, test: RowIndex, on_train: Outputs, on_test: Outputs
) -> dict[str, Any]:
    """Linear and nearest-neighbour accuracy of the frozen encoder, per stream and of both sides."""
    n_classes = len(train.classes)
    known = train.labels_N >= 0
    y_N = train.labels_N[known]
    probe, knn, scores = {}, {}, {}
    for name in (*STREAMS, BOTH_SIDES):
        x_ND, z_MD = _features(on_train, name)[known], _features(on_test, name)
        found = linear_probe(x_ND, y_N, z_MD, n_classes, config.evaluate.probe_epochs)
        probe[name] = topk_accuracy(found, test.labels_N)
        k = min(config.evaluate.knn_k, len(x_ND))
        knn[name] = topk_accuracy(knn_probe(x_ND, y_N, z_MD, n_classes, k), test.labels_N)
        if name in STREAMS:
            scores[name] = found
    return {"probe": probe, "knn": knn, "probe_scores": scores}


def _features(outputs: Outputs, name: str) -> NDArray[np.float32]:
    """Token means of a stream [N, D]; of both sides, unit vectors one after the other [N, 2 D]."""
    if name != BOTH_SIDES:
        return outputs[f"z.{name}"]
    return np.concatenate([unit(outputs[f"z.{side}"]) for side in STREAMS[:2]], axis=1)


def _retrieval(
    config: TrainingConfig, test: RowIndex, on_test: Outputs, space: str
) -> dict[str, float]:
    per_class = config.evaluate.retrieval_per_class
    rows = subset_per_class(test.clip_ids_N.tolist(), test.labels_N, per_class)
    audio, video = (on_test[f"{space}.{s}"] for s in ("audio", "video"))
    found = {"n_clips": float(len(rows)), **retrieval(audio[rows], video[rows])}
    if np.bincount(test.labels_N).max() > 1:
        found |= class_retrieval(audio, video, test.labels_N)
    return found


def _confusion(scores: dict[str, NDArray], test: RowIndex) -> dict[str, Any]:
    counts = confusion_counts(test.labels_N, scores[_main(scores)].argmax(1), len(test.classes))
    rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    pairs = most_confused_pairs(counts, _WORST_PAIRS)
    return {
        "mean_offdiagonal": float(1.0 - rates.diagonal()[counts.sum(1) > 0].mean()),
        "worst_pairs": [
            [test.classes[pair.first], test.classes[pair.second], pair.degree] for pair in pairs
        ],
    }


def _main(scores: dict[str, NDArray]) -> str:
    return "fusion" if "fusion" in scores else next(iter(scores))


def _write(
    folder: Path,
    test: RowIndex,
    split: str,
    scores: dict[str, NDArray],
    on_test: Outputs,
    space: str,
    clusters: dict[str, int],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    n_classes = len(test.classes)
    predictions = {s: x.argmax(1) for s, x in scores.items()}
    columns = {
        "clip_id": test.clip_ids_N.tolist(),
        "label": test.labels_N,
        "split": [split] * len(test),
        **{f"pred_{s}": p for s, p in predictions.items()},
        "p_fusion": scores[_main(scores)].max(1).astype(np.float32),
        "cluster": np.array([clusters.get(c, -100) for c in test.clip_ids_N], np.int32),
    }
    pq.write_table(pa.table(columns), folder / "predictions.parquet")
    confusion: dict[str, Any] = {"classes": np.array(test.classes)}
    for s, p in predictions.items():
        confusion[s] = confusion_counts(test.labels_N, p, n_classes)
    embeddings: dict[str, Any] = {"clip_ids": np.array(test.clip_ids_N.tolist())}
    embeddings |= {s: on_test[f"{space}.{s}"] for s in STREAMS}
    np.savez_compressed(folder / "confusion.npz", **confusion)
    np.savez_compressed(folder / "embeddings.npz", **embeddings)
