"""Predictions: what a run's models say of each clip, and `evaluation/predictions.parquet`.

The one file that every later analysis reads: report, comparison, VGGSounder. Knows nothing of
metrics. Invariants: classes are known by name, and the order of a list of probabilities is in the
file that holds it; the probabilities are those the metrics were computed from, bit by bit.

Columns of the file, a row a clip (S: audio, video, fusion; those that were scored):

clip_id           as in the store
group             what was cut from one recording; clips of a group are not independent
label             position of the true class in `classes`
split             test or validation
pred_S            position of the class that scores highest
rank_S            rank of the true class, 1 is right; of equal scores the lower class comes first
probabilities_S   [C] float32, in the order of `classes`
p_fusion          probability of `pred_fusion` (of the only stream, where there is one)
cluster           last pseudo-label, -100 where the clip was never clustered

Its schema's metadata `diccae` is JSON: `classes`, `scorer` (classifier, or the probe that stood in
for one), `config_hash` of the evaluation, and the digests of the `models`.

Shapes: M clips, C classes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.storage import Location, fetched
from training.config import STREAMS
from training.errors import TrainingError
from training.evaluation.scores import label_ranks

FILE = "predictions.parquet"
_ABOUT = b"diccae"
_VERDICTS = ("clip_id", "group", "label", "split", "p_fusion", "cluster")


class About(NamedTuple):
    """What pins the predictions of a file."""

    classes: Sequence[str]
    scorer: str
    config_hash: str
    split: str
    models: Mapping[str, str] | None = None
    """`models_of` the run; None in the file of a version that did not write it."""


class Predictions(NamedTuple):
    """Scores of M clips, and what is true of them."""

    clip_ids: list[str]
    groups: list[str]
    labels_M: NDArray[np.int64]
    about: About
    scores: Mapping[str, NDArray[np.float32]]
    """Probabilities [M, C] by stream."""
    clusters_M: NDArray[np.int32]

    @property
    def n_clips(self) -> int:
        """M."""
        return len(self.labels_M)


def models_of(run: Location) -> dict[str, str]:
    """SHA-256 of the tensors of a run's encoder and classifier, as far as they are there."""
    cards = {kind: f"{kind}/{kind}.json" for kind in ("encoder", "classifier")}
    return {
        kind: json.loads(run.read_bytes(card))["sha256"]
        for kind, card in cards.items()
        if run.exists(card)
    }


def models_predicted(schema: pa.Schema) -> dict[str, str] | None:
    """`models_of` the run that a file of predictions is of; None if it does not say."""
    about = (schema.metadata or {}).get(_ABOUT)
    found: dict[str, str] | None = json.loads(about).get("models") if about else None
    return found


def retrained_since(run: Location, models: Mapping[str, str] | None) -> list[str]:
    """The models of a run that are others than those its predictions are of, or came since.

    A model that is gone is none of them: predictions are kept longer than weights.
    Args: models: of `About`; None, of an earlier version, is taken for those that are there.
    """
    now = models_of(run) if models is not None else {}
    return [kind for kind, digest in now.items() if (models or {}).get(kind) != digest]


def write_predictions(file: Path, given: Predictions) -> None:
    """Write the file. Half a second and 50 MB for VGGSound's 15,446 clips of 309 classes."""
    main = given.scores.get("fusion", next(iter(given.scores.values())))
    columns: dict[str, Any] = {
        "clip_id": given.clip_ids,
        "group": given.groups,
        "label": given.labels_M,
        "split": [given.about.split] * given.n_clips,
    }
    for stream, scores_MC in given.scores.items():
        columns[f"pred_{stream}"] = scores_MC.argmax(1)
    columns["p_fusion"] = main.max(1).astype(np.float32)
    columns["cluster"] = given.clusters_M
    for stream, scores_MC in given.scores.items():
        ranks_M = label_ranks(scores_MC, given.labels_M) + 1
        columns[f"rank_{stream}"] = ranks_M.astype(np.int32)
    for stream, scores_MC in given.scores.items():
        flat = pa.array(np.ascontiguousarray(scores_MC, np.float32).reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(flat, scores_MC.shape[1])
        columns[f"probabilities_{stream}"] = lists
    about = {name: value for name, value in given.about._asdict().items() if name != "split"}
    table = pa.table(columns).replace_schema_metadata({_ABOUT: json.dumps(about)})
    # Bytes of one place side by side: probabilities share their exponents and little else.
    split_bytes = [f"probabilities_{s}.list.element" for s in given.scores]
    pq.write_table(
        table,
        file,
        compression="zstd",
        use_dictionary=[name for name in _VERDICTS if name in columns],
        use_byte_stream_split=split_bytes,
    )


def read_predictions(file: str | Path) -> Predictions:
    """Args: file: path or URI. Raises: TrainingError if it is not there, or holds no
    probabilities."""
    try:
        with fetched(file) as path:
            table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[_ABOUT])
        split = table["split"][0].as_py() if len(table) else "test"
        return Predictions(
            clip_ids=table["clip_id"].to_pylist(),
            groups=table["group"].to_pylist(),
            labels_M=table["label"].to_numpy().astype(np.int64),
            about=About(**about, split=split),
            scores={
                s: _scores(table, s) for s in STREAMS if f"probabilities_{s}" in table.schema.names
            },
            clusters_M=table["cluster"].to_numpy().astype(np.int32),
        )
    except FileNotFoundError as error:
        raise TrainingError(f"{file}: not there; run diccae evaluate on the run first") from error
    except (KeyError, ValueError, pa.ArrowException) as error:
        raise TrainingError(
            f"{file}: no probabilities of clips as this version writes them ({error}); run diccae "
            "evaluate on the run again"
        ) from error


def _scores(table: pa.Table, stream: str) -> NDArray[np.float32]:
    column = table[f"probabilities_{stream}"].combine_chunks()
    scores_MC: NDArray[np.float32] = column.flatten().to_numpy().reshape(len(table), -1)
    return scores_MC
