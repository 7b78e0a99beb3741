"""A run is one MLflow run: what its stages send must not share a name."""

from pathlib import Path

import numpy as np
from support.memory import N_CLASSES
from support.trainers import make_trainer, pretrain_config

from diccae.stages.evaluate import scalars
from training.config import STREAMS
from training.evaluation.metrics import Evidence, measure
from training.evaluation.results import Evaluation, count_confusion


def _evaluation() -> Evaluation:
    """Of eight clips, a quarter of which is taken for the next class."""
    labels_M = np.arange(8) % N_CLASSES
    taken_M = np.where(np.arange(8) < 2, (labels_M + 1) % N_CLASSES, labels_M)
    scores_MC = np.eye(N_CLASSES, dtype=np.float32)[taken_M]
    by_stream = dict.fromkeys(STREAMS, scores_MC)
    given = Evidence(
        clip_ids_M=[f"clip{i}" for i in range(8)],
        labels_ML=labels_M[:, None],
        classifier=by_stream,
        probes={name: by_stream for name in ("probe", "probe_few", "knn")},
        embeddings=by_stream,
        middle_frame=by_stream,
        confused_pairs=[],
        clusters_M=np.full(8, -100, np.int32),
        retrieval_per_class=2,
    )
    classes = [f"class {i}" for i in range(N_CLASSES)]
    confusion = count_confusion(given, classes)
    about = (8, 8, "test", classes)
    return Evaluation(*about, measure(given), confusion.summary([]), confusion.accuracies())


def test_evaluation_sends_nothing_under_a_name_of_training(tmp_path: Path) -> None:
    trainer, recorder = make_trainer(pretrain_config(), tmp_path)
    trainer.run()
    trained = {name for _, metrics in recorder.logged for name in metrics}
    sent = dict(scalars(_evaluation().as_json()))
    assert "confusion/mean_offdiagonal" in trained
    assert sent["confusion/mean_class_error"] == 0.25
    assert not trained & sent.keys()
