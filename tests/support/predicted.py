"""Run folders of synthetic predictions: what an evaluation leaves, without a model or a store."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diccae.config import RunConfig, config_text
from training.evaluation.predictions import FILE, About, Predictions, write_predictions

STREAMS = ("audio", "video", "fusion")


def softmax(x: NDArray[np.floating]) -> NDArray[np.float32]:
    e = np.exp(x - x.max(1, keepdims=True))
    return (e / e.sum(1, keepdims=True)).astype(np.float32)


def predictions(
    clip_ids: Sequence[str],
    classes: Sequence[str],
    labels: Sequence[int] | NDArray[np.int64],
    scores: Mapping[str, NDArray[np.float32]],
    groups: Sequence[str] | None = None,
) -> Predictions:
    about = About(list(classes), "classifier", RunConfig().digest(), "test")
    clusters = np.full(len(clip_ids), -100, np.int32)
    own = list(groups or clip_ids)
    return Predictions(list(clip_ids), own, np.asarray(labels), about, scores, clusters)


def predicted_run(folder: Path, given: Predictions, **results: object) -> Path:
    """A run folder that was evaluated with the default config."""
    (folder / "evaluation").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_text(RunConfig()))
    (folder / "results.json").write_text(json.dumps({"n_test": given.n_clips, **results}))
    write_predictions(folder / "evaluation" / FILE, given)
    return folder
