"""The parts of a run folder that a report reads, as a run leaves them and without a model.

Knows nothing of which clips there are. Invariant: rounds and the files of `evaluation/` are written
by what writes them in a run, so they have all that it writes.

Shapes: L lines of metrics, N clips of a round, M clips measured, C classes, P embedding width.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clustering.rounds.files import publish
from clustering.rounds.protocol import HeadLabels, PublishedRound
from pipeline.storage import Location
from training.evaluation.metrics import Evidence
from training.evaluation.predictions import About, models_of
from training.evaluation.results import count_confusion, write_evaluation

Floats = NDArray[np.float64]


def curves(t_L: Floats, labelled_from: float = 0.0) -> dict[str, Floats]:
    """What pretraining logs, by name; what only labels give is NaN before there are any.

    Args: t_L: from 0 at the start of the run to 1 at its end.
    """
    falling = {"loss": 5.5, "loss_instance": 5.2, "loss_intra": 1.1}
    columns = {name: top * np.exp(-3 * t_L) + 0.4 for name, top in falling.items()}
    columns |= {"epoch": 12 * t_L, "accuracy_instance": 1 - np.exp(-4 * t_L)}
    columns |= {"lr": 2e-4 * np.minimum(1, 8 * t_L) * (1 - 0.9 * t_L)}
    columns |= {"grad_norm": 3 * np.exp(-t_L) + 0.2, "clips_per_s": 830 + 40 * np.sin(40 * t_L)}
    parts = ("data_wait", "forward", "loss", "gather", "backward", "update", "push", "stall")
    columns |= {f"time/{part}": np.full_like(t_L, 0.05) for part in parts}
    columns |= {"world_size": np.full_like(t_L, 8), "attempt": np.ones_like(t_L)}
    labelled = {"loss_class_alignment": 1.3 * np.exp(-t_L), "loss_confusion": 0.9 * np.exp(-t_L)}
    labelled |= {"labelled_frac": np.minimum(1, 3 * (t_L - labelled_from))}
    labelled |= {"confusion/mean_offdiagonal": 0.05 * np.exp(-t_L)}
    labelled |= {"clustering/nmi": np.full_like(t_L, 0.6)}
    labelled |= {"loss_reconstruction": np.full_like(t_L, np.nan)}
    is_labelled_L = t_L > labelled_from
    return columns | {n: np.where(is_labelled_L, x_L, np.nan) for n, x_L in labelled.items()}


def write_metrics(file: Path, columns: Mapping[str, Floats], every: int = 10) -> None:
    """A line each `every` steps; NaN is null, as the tracker has it."""
    names = list(columns)
    rows = zip(*(x_L.tolist() for x_L in columns.values()), strict=True)
    with file.open("w") as opened:
        for k, row in enumerate(rows, 1):
            line = {"step": every * k, "time": 1.76e9 + k}
            values = (None if value != value else value for value in row)
            opened.write(json.dumps({**line, **dict(zip(names, values, strict=True))}) + "\n")


def publish_round(
    run: Path,
    number: int,
    step: int,
    keys_N: NDArray[np.uint64],
    labels: Mapping[str, NDArray[np.int32]],
    *,
    n_clusters: int,
    width: int,
    reason: str = "",
) -> None:
    """A round with a head for each stream.

    Args: keys_N: in any order. labels: by stream, [N]. reason: why it is withheld; "" publishes it.
    """
    order, rng = np.argsort(keys_N), np.random.default_rng(number)
    eye = np.eye(n_clusters, dtype=np.float32)
    heads = []
    for stream, labels_N in labels.items():
        prototypes = {stream: rng.normal(size=(n_clusters, width)).astype(np.float32)}
        of_keys_N = labels_N[order].astype(np.int32)
        heads.append(HeadLabels(stream, (stream,), keys_N[order], of_keys_N, prototypes, eye))
    sizes = np.bincount(next(iter(labels.values())), minlength=n_clusters)
    health = {"inertia": 1e5 / number, "iterations": 12.0, "n_empty": float((sizes == 0).sum())}
    health |= {"size_min": float(sizes.min()), "size_max": float(sizes.max())}
    health |= {"effective_clusters": n_clusters * 0.85 + number / 2, "churn": 0.4 / number}
    health |= {"coverage": 0.9 + number / 500, "mean_cosine": 0.2, "age_mean": 812.5}
    health["seconds"] = 61.2
    ok = not reason
    done = PublishedRound(number, step, ok, reason, heads if ok else [], health)
    publish(str(run / "rounds"), done)


def write_predicted(
    run: Path,
    clip_ids: Sequence[str],
    classes: Sequence[str],
    labels_M: NDArray[np.int64],
    predicted: Mapping[str, NDArray[np.int64]],
    *,
    sure_M: Floats,
    embeddings: Mapping[str, NDArray[np.float32]],
) -> None:
    """`evaluation/`, and the cards of the models that it is of.

    Args: predicted: by stream, [M]. sure_M: probability of what is predicted; what is left goes to
        the other classes about evenly. embeddings: by stream, [M, P].
    """
    for kind, digest in (("encoder", "1" * 64), ("classifier", "2" * 64)):
        (run / kind).mkdir()
        (run / kind / f"{kind}.json").write_text(json.dumps({"sha256": digest, "config": {}}))
    given = Evidence(
        clip_ids_M=list(clip_ids),
        labels_ML=labels_M[:, None],
        classifier={s: _scores(x_M, sure_M, len(classes)) for s, x_M in predicted.items()},
        probes={},
        embeddings=embeddings,
        middle_frame={},
        confused_pairs=[],
        clusters_M=np.full(len(clip_ids), -100, np.int32),
        retrieval_per_class=5,
    )
    place = Location(str(run))
    about = About(list(classes), given.scorer, "c0ffee", "test", models_of(place))
    confusion = count_confusion(given, classes)
    write_evaluation(place.below("evaluation"), given, confusion, {}, about)


def _scores(predicted_M: NDArray[np.int64], sure_M: Floats, n_classes: int) -> NDArray[np.float32]:
    rows = np.arange(len(predicted_M))
    scores_MC = 0.5 + np.random.default_rng(0).random((len(rows), n_classes))
    scores_MC[rows, predicted_M] = 0
    scores_MC *= ((1 - sure_M) / scores_MC.sum(1))[:, None]
    scores_MC[rows, predicted_M] = sure_M
    assert (scores_MC.argmax(1) == predicted_M).all(), "sure_M is too low to be the highest"
    return scores_MC.astype(np.float32)
