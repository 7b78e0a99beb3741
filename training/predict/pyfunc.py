"""ClipModel: a saved model as MLflow loads it (`mlflow.pyfunc.load_model`, `mlflow models serve`).

Knows nothing of registries. Invariants: nothing is unpickled, on either side; any number of clips
makes one batch, and a broken one answers with its reason beside the others.

Input is one column: paths or URIs that the loading machine can read, or bytes of clips' files. A
column named `content` holds bytes, which JSON has as base64.
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.reasons import Reason, Rejected
from pipeline.source.named import NamedClip, named_clips
from training.config import STREAMS
from training.predict.clips import ClipDecoder
from training.predict.find import find_models
from training.predict.predictor import Answer, Predictor

_CONTENT = "content"


def _load_pyfunc(data_path: str) -> "ClipModel":
    """What MLflow calls (`loader_module` of MLmodel)."""
    return ClipModel(data_path)


class ClipModel:
    """A model with its decoders, for as long as the process lives; may be asked by many threads."""

    def __init__(self, folder: str) -> None:
        saved = find_models(folder)
        self._predictor = Predictor(saved, embeddings=saved.classifier is None)
        self._decoder = ClipDecoder(saved.spec)

    def predict(self, model_input: Any, params: Any = None) -> pd.DataFrame:
        """A row for each row: `clip`, `reason` and `detail` (of a broken clip), and the answers.

        Of a classifier: `class`, `p`, `margin`, `confused_with`, `decided_by`, and class and
        probability of each stream. Of an encoder: an embedding a stream.
        Args: model_input: list, array, Series or DataFrame of paths or URIs, or of bytes.
        """
        given = list(_rows(model_input))
        answers = self._predictor.answers(self._decoder.decode(clip for _, clip in given))
        rows = [_row(name, answer) for (name, _), (_, answer) in zip(given, answers, strict=True)]
        table = pd.DataFrame(rows, columns=columns(self._predictor))
        return table.astype(object).where(table.notna(), None)

    def close(self) -> None:
        """End the decoders' processes before this one ends."""
        self._decoder.close()


def columns(predictor: Predictor) -> list[str]:
    """Of the answers, in order."""
    about = ["clip", "reason", "detail"]
    if not predictor.streams:
        return [*about, *STREAMS]
    by_stream = [f"{stream}_{what}" for stream in predictor.streams for what in ("class", "p")]
    return [*about, "class", "p", "margin", "confused_with", "decided_by", *by_stream]


def _rows(model_input: Any) -> Iterator[tuple[str, NamedClip | bytes]]:
    """Name and clip of each row; what is no clip is rejected here."""
    if isinstance(model_input, pd.DataFrame):
        name = str(model_input.columns[0])
        # A dict of lists reaches us as one row with a list in it.
        cells = model_input.iloc[:, 0].explode().tolist()
        yield from (_one(cell, is_content=name == _CONTENT) for cell in cells)
        return
    is_one = isinstance(model_input, str | bytes | Path)
    for each in [model_input] if is_one else model_input:
        yield _one(each, is_content=False)


def _one(given: Any, is_content: bool) -> tuple[str, NamedClip | bytes]:
    if isinstance(given, bytes):
        return "", given
    if is_content and isinstance(given, str):
        try:
            return "", base64.b64decode(given)
        except ValueError as error:
            return _refused("", f"{_CONTENT} is neither bytes nor base64: {error}")
    if not isinstance(given, str | Path) or not str(given):
        return _refused("", f"found {given!r:.40}: neither a path or URI nor bytes")
    found = named_clips([str(given)])
    if len(found) == 1:
        return str(given), found[0]
    # One row is one answer.
    return _refused(str(given), f"a folder of {len(found)} clips: name each of them")


def _refused(name: str, why: str) -> tuple[str, NamedClip]:
    return name, NamedClip(name, {}, Rejected(Reason.OPEN_FAILED, why))


def _row(name: str, answer: Answer) -> dict[str, Any]:
    row: dict[str, Any] = {"clip": name}
    if answer.rejected is not None:
        return row | {"reason": str(answer.rejected.reason), "detail": answer.rejected.detail}
    row |= {stream: vector_P.tolist() for stream, vector_P in answer.embeddings.items()}
    if answer.main is None:
        return row
    row |= {"class": answer.main.guesses[0].name, "p": answer.main.guesses[0].p}
    row["margin"] = answer.main.margin
    for stream, each in answer.streams.items():
        row |= {f"{stream}_class": each.guesses[0].name, f"{stream}_p": each.guesses[0].p}
    if answer.confused is not None:
        row |= {"confused_with": answer.confused.other, "decided_by": answer.confused.decided_by}
    return row
