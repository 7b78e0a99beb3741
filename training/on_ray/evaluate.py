"""The evaluation of a run folder: models applied by Ray actors, probes fitted where GPUs are.

Composes inference with the pure tables of training.evaluation; knows nothing of the command line,
nor of any single metric. Invariant: the clips tested choose nothing (no epoch, no pair, no
threshold), and their number stands beside every result.

Shapes: N train and M test clips, A train clips with a label, Q of them asked, D token width, C
classes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clustering.kmeans.label_table import NO_LABEL
from pipeline.storage import Location
from training.config import STREAMS, TrainingConfig
from training.data.rows import RowIndex
from training.errors import TrainingError
from training.evaluate_config import EvaluateConfig
from training.evaluation.metrics import BOTH_SIDES, Evidence, measure
from training.evaluation.predictions import About, models_of
from training.evaluation.probes import PROBES, knn_probe
from training.evaluation.results import Evaluation, count_confusion, write_evaluation
from training.evaluation.retrieval import subset_per_class, unit_rows
from training.evaluation.scores import ConfusedPair, most_confused_pairs
from training.on_ray.inference import run_jobs
from training.predict.apply import ByStream, Models, Outputs, test_passes
from training.predict.jobs import Apply, Job, paged_array
from training.weights.card import Applied, Space
from training.weights.files import read_card

_PAIR_CLIPS = 50
"""Training clips of a class that are asked for their neighbours to find these pairs."""
_COPIED_ROWS = 8192
"""Features copied at a time: all of 200,000 clips at once are a gigabyte of the driver's memory."""


def evaluate(
    config: TrainingConfig,
    train: RowIndex,
    test: RowIndex,
    out: Location,
    clusters: dict[str, int],
    *,
    groups: Mapping[str, str],
    config_hash: str,
    apply: Apply = run_jobs,
    may_write: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a run folder's encoder, and classifier if there is one, on the clips of `split`.

    Args: clusters: last pseudo-label by clip id. groups: the recording of each clip, by clip id.
        config_hash: stands in the file of predictions. may_write: asked before files are written.
    Raises: TrainingError if the run folder has no encoder, or no training clip a label.
    """
    models = _models(out)
    space = applied_by(config, out.uri_of("encoder")).space
    given = _evidence(config, train, test, models, space, clusters, apply=apply)
    confusion, split = count_confusion(given, test.classes), config.evaluate.split
    may_write()
    about = About(test.classes, given.scorer, config_hash, split, models_of(out))
    write_evaluation(out.below("evaluation"), given, confusion, groups, about)
    return Evaluation(
        n_train=len(train),
        n_test=len(test),
        split=split,
        classes=test.classes,
        measured=measure(given),
        confusion=confusion.summary(given.confused_pairs),
        class_accuracy=confusion.accuracies(),
    )


def _evidence(
    config: TrainingConfig,
    train: RowIndex,
    test: RowIndex,
    models: Models,
    space: Space,
    clusters: dict[str, int],
    *,
    apply: Apply,
) -> Evidence:
    of_test, of_train, middle = _outputs(config, models, space, train, test, apply)
    scores, pairs = _probe(config, train, test, of_train, of_test)
    return Evidence(
        clip_ids_M=test.clip_ids_N.tolist(),
        labels_ML=test.labels_NL,
        classifier={s: of_test.p[s] for s in STREAMS if s in of_test.p},
        probes=scores,
        embeddings={s: of_test.of(space)[s] for s in STREAMS},
        middle_frame=middle.of(space),
        confused_pairs=pairs,
        clusters_M=np.array([clusters.get(c, NO_LABEL) for c in test.clip_ids_N], np.int32),
        retrieval_per_class=config.evaluate.retrieval_per_class,
    )


def applied_by(config: TrainingConfig, encoder_uri: str) -> Applied:
    """How evaluation applies an encoder: as the config says, in the space it was trained in."""
    return Applied.of(config, read_card(encoder_uri, "encoder")[0].space)


def _models(out: Location) -> Models:
    if not out.exists("encoder/encoder.json"):
        raise TrainingError(f"{out.uri}: no encoder/ in this run folder; run diccae pretrain first")
    has_classifier = out.exists("classifier/classifier.json")
    return Models(out.uri_of("encoder"), out.uri_of("classifier") if has_classifier else None)


def _outputs(
    config: TrainingConfig,
    models: Models,
    space: Space,
    train: RowIndex,
    test: RowIndex,
    apply: Apply,
) -> tuple[Outputs, Outputs, Outputs]:
    """Of the test clips, of the training clips, and of one pass over the test clips."""
    frames = config.evaluate.frames
    jobs = [
        Job(test, frames, ("z", "h", "p") if models.classifier else ("z", "h")),
        # Only what probes are fitted on: heads and probabilities of 200,000 clips are gigabytes.
        Job(train, frames, ("z",)),
    ]
    one_pass = test_passes(test.spec.n_frames, config.data.frames_per_clip, frames) == 1
    if not one_pass:
        jobs.append(Job(test, 1, (space,)))
    done = apply(jobs, models, config.data, config.scale, config.evaluate)
    # Where all passes are one, its frames are the middle ones already.
    return done[0], done[1], done[0] if one_pass else done[2]


class _Frozen(NamedTuple):
    """Features that probes are fitted on: all of them in one message, since of 200,000 clips those
    of one stream are half a gigabyte."""

    train: ByStream
    """Token means [N, D] of all training clips."""
    test: ByStream
    known_A: NDArray[np.int64]
    """Training clips that have a label."""
    labels_A: NDArray[np.int64]
    asked_Q: NDArray[np.int64]
    """Of the known ones those that are asked for their neighbours."""
    n_classes: int


class _Probed(NamedTuple):
    scores: dict[str, ByStream]
    """By probe, then by stream."""
    votes_QC: NDArray[np.float32]
    """Of the neighbours of each clip that is asked, by both sides."""


def _probe(
    config: TrainingConfig, train: RowIndex, test: RowIndex, of_train: Outputs, of_test: Outputs
) -> tuple[dict[str, ByStream], list[ConfusedPair]]:
    """Scores of every probe on every stream of the frozen encoder, and on both sides at once, and
    the most confused pairs."""
    known_A = np.flatnonzero(train.labels_N >= 0)
    if not len(known_A):
        raise TrainingError(
            f"{train.store_uri}: no training clip has a label, and probes are fitted on labels; "
            "ingest a CSV with labels"
        )
    labels_A = train.labels_N[known_A]
    asked_Q = subset_per_class(train.clip_ids_N[known_A].tolist(), labels_A, _PAIR_CLIPS)
    frozen = _Frozen(of_train.z, of_test.z, known_A, labels_A, asked_Q, len(train.classes))
    probed: _Probed = _where_gpus_are(config.scale.use_gpu, _fit, frozen, config=config.evaluate)
    n_pairs = config.evaluate.confused_pairs
    pairs = _confused_pairs(probed.votes_QC, labels_A[asked_Q], test.labels_N, n_pairs)
    return probed.scores, pairs


def _fit(frozen: _Frozen, *, config: EvaluateConfig, device: str = "cpu") -> _Probed:
    """Fit every probe on every stream and on both sides."""
    scores: dict[str, ByStream] = {probe.name: {} for probe in PROBES}
    labels_A, n_classes, asked_Q = frozen.labels_A, frozen.n_classes, frozen.asked_Q
    for name in (*STREAMS, BOTH_SIDES):
        x_AD = _features(frozen.train, name, frozen.known_A)
        z_MD = _features(frozen.test, name, np.arange(len(frozen.test[STREAMS[0]])))
        for probe in PROBES:
            given = (x_AD, labels_A, z_MD, n_classes)
            scores[probe.name][name] = probe.scores(*given, config=config, device=device)
    # The last ones are of both sides.
    queries = (x_AD[asked_Q], n_classes)
    votes_QC = knn_probe(x_AD, labels_A, *queries, k=config.knn_k, own_M=asked_Q, device=device)
    return _Probed(scores, votes_QC)


def _features(z: ByStream, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Token means of a stream [N, D]; of both sides, unit vectors one after the other [N, 2 D]."""
    sides = STREAMS[:2] if name == BOTH_SIDES else (name,)
    widths = [z[side].shape[1] for side in sides]
    features = paged_array(len(rows), sum(widths))
    for start in range(0, len(rows), _COPIED_ROWS):
        part = rows[start : start + _COPIED_ROWS]
        vectors = [z[side][part] for side in sides]
        if name == BOTH_SIDES:
            vectors = [unit_rows(x_ND) for x_ND in vectors]
        features[start : start + _COPIED_ROWS] = np.concatenate(vectors, axis=1)
    return features


def _confused_pairs(
    votes_AC: NDArray[np.float32],
    labels_A: NDArray[np.integer],
    tested_M: NDArray[np.integer],
    n_pairs: int,
) -> list[ConfusedPair]:
    """The pairs that training clips confuse most, among classes that are tested."""
    n_classes = votes_AC.shape[1]
    confusion_CC = np.zeros((n_classes, n_classes))
    np.add.at(confusion_CC, labels_A, votes_AC)
    untested = np.setdiff1d(np.arange(n_classes), tested_M)
    confusion_CC[untested] = confusion_CC[:, untested] = 0
    return most_confused_pairs(confusion_CC, n_pairs)


def _where_gpus_are(use_gpu: bool, call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """The result of `call`, in this process, or on a worker's GPU: the driver's node has none."""
    if not use_gpu:
        return call(*args, **settings)
    import ray

    return ray.get(ray.remote(num_gpus=1)(call).remote(*args, **settings, device="cuda"))
