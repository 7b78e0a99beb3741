"""Answers: the classes a model named for each clip, of a run of ours or of another project's file.

Knows nothing of what is right. Invariant: classes are names here; a list of scores is read by the
names that belong to its places, never by the order of another list.

Files of other projects, by their ending:

.csv .parquet   a row a clip: clip_id (or video_id, id), and for each stream a column audio, video,
                fusion (or a, v, av) with the name of the class; a Parquet file may also be ours
.json .pkl      VGGSounder's {clip_id: {"logits": {"a": [C], ...}}} or {clip_id: {"predictions":
                {"a": [name, ...], ...}}}, with v and av likewise; pickles are read as plain data

Shapes: M clips, C classes.
"""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import fetched
from training.comparison.plain_pickle import NotPlain, load_plain
from training.errors import TrainingError
from training.evaluation.predictions import Predictions, read_predictions
from training.vggsounder.labels import class_names
from training.vggsounder.scores import STREAM_OF

Said = tuple[str, ...] | None
"""The classes named for a clip: mostly one, several of a model that tags; None: not asked."""
_IDS = ("clip_id", "video_id", "id")
_STREAMS = {**STREAM_OF, **{stream: stream for stream in STREAM_OF.values()}}


class Answers(NamedTuple):
    """What a model said of M clips."""

    name: str
    clip_ids: list[str]
    said: Mapping[str, Sequence[Said]]
    """By stream, [M]."""
    classes: tuple[str, ...] = ()
    """All that a model can name, where that is known."""


def of_run(name: str, predictions: Predictions) -> Answers:
    """Top-1 of a run."""
    names = list(predictions.about.classes)
    said: dict[str, list[Said]] = {
        stream: [(names[k],) for k in scores_MC.argmax(1).tolist()]
        for stream, scores_MC in predictions.scores.items()
    }
    return Answers(name, predictions.clip_ids, said, tuple(names))


def read_answers(file: str, classes_file: str | None = None) -> Answers:
    """Read a file of another project.

    Args: file: path or URI. classes_file: the names of its scores' places (CSV with display_name),
        path or URI; None: VGGSounder's.
    Raises: TrainingError naming what was found and what is read.
    """
    readers = {".csv": _csv, ".parquet": _parquet, ".json": _by_clip, ".pkl": _by_clip}
    suffix = PurePosixPath(file).suffix.lower()
    if suffix not in readers:
        raise TrainingError(f"{file}: found {suffix!r}, can read {', '.join(readers)}")
    try:
        with fetched(file) as path:
            try:
                answers = readers[suffix](path, classes_file)
            except TrainingError as error:
                # The user's name of the file, and not that of a copy.
                said = str(error).removeprefix(f"{path}: ")
                raise TrainingError(f"{file}: {said}") from error
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise TrainingError(f"{file}: cannot be read ({error})") from error
    given = {s: said for s, said in answers.said.items() if any(each for each in said)}
    if not given:
        raise TrainingError(
            f"{file}: names no class in any of {len(answers.clip_ids)} clips; expected a column, "
            "or a list, for one of " + ", ".join(_STREAMS)
        )
    [(clip_id, times)] = Counter(answers.clip_ids).most_common(1)
    if times > 1:
        raise TrainingError(
            f"{file}: a clip stands in it twice ({clip_id!r}); expected a row a clip"
        )
    return answers._replace(said=given)


def _csv(path: Path, _: str | None) -> Answers:
    # Spreadsheets write a mark before the first column's name.
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True)
        header = [name.strip() for name in next(reader, [])]
        rows = []
        for row in filter(None, reader):
            if len(row) != len(header):
                raise TrainingError(
                    f"line {reader.line_num}: {len(row)} columns, expected {len(header)} "
                    f"({', '.join(header)}); a class name with a comma needs quotes"
                )
            rows.append([cell.strip() for cell in row])
    columns = {name: [row[k] for row in rows] for k, name in enumerate(header)}
    return _columns(path.name, columns)


def _parquet(path: Path, _: str | None) -> Answers:
    names = pq.read_schema(path).names
    if any(name.startswith("probabilities_") for name in names):
        return of_run(path.name, read_predictions(path))
    wanted = [name for name in names if name in (*_IDS, *_STREAMS)]
    return _columns(path.name, pq.read_table(path, columns=wanted).to_pydict())


def _columns(name: str, columns: Mapping[str, list[Any]]) -> Answers:
    ids = next((columns[name] for name in _IDS if name in columns), None)
    if ids is None:
        found = ", ".join(columns) or "nothing"
        raise TrainingError(f"columns {found}; one of {', '.join(_IDS)} has to be there")
    said: dict[str, list[Said]] = {
        _STREAMS[name]: [(str(each),) if each else () for each in values]
        for name, values in columns.items()
        if name in _STREAMS
    }
    return Answers(name, [_clip_id(each) for each in ids], said)


def _by_clip(path: Path, classes_file: str | None) -> Answers:
    content = path.read_bytes()
    if path.suffix.lower() == ".json":
        found = json.loads(content)
    else:
        try:
            found = load_plain(content)
        except NotPlain as error:
            raise TrainingError(
                f"holds {error}; only arrays of numbers, dicts, lists, names and numbers "
                "are read, and nothing of it was run"
            ) from error
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise TrainingError("expected {clip_id: {'logits' or 'predictions': ...}}")
    names = _names(classes_file) if any("logits" in each for each in found.values()) else []
    said: dict[str, list[Said]] = {
        stream: [_said_of(clip_id, each, key, names) for clip_id, each in found.items()]
        for key, stream in STREAM_OF.items()
    }
    return Answers(path.name, [_clip_id(clip_id) for clip_id in found], said)


def _said_of(clip_id: object, entry: Mapping[str, Any], key: str, names: Sequence[str]) -> Said:
    """Top-1 of the scores if there are any, else what is named."""
    for kind in ("logits", "predictions"):
        values = entry.get(kind)
        given = values.get(key) if isinstance(values, dict) else None
        if given is None:
            continue
        if kind == "predictions":
            return _listed(clip_id, key, given)
        scores_C = np.asarray(given)
        if scores_C.shape != (len(names),) or scores_C.dtype.kind not in "fiu":
            raise TrainingError(
                f"clip {clip_id}, {key}: scores of shape {scores_C.shape}, and "
                f"{len(names)} classes have names; give those of the file with --classes"
            )
        if not np.isfinite(scores_C).all():
            raise TrainingError(f"clip {clip_id}, {key}: scores that are not finite")
        return (names[int(scores_C.argmax())],)
    return None


def _listed(clip_id: object, key: str, given: Any) -> tuple[str, ...]:
    """The names in a list; a name alone is one name, and not a list of its letters."""
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list | tuple | np.ndarray):
        raise TrainingError(
            f"clip {clip_id}, {key}: predictions are {given!r:.40}; expected a list of names"
        )
    return tuple(str(each) for each in np.ravel(np.asarray(given, object)))


def _names(classes_file: str | None) -> list[str]:
    if classes_file is None:
        return class_names()
    try:
        with fetched(classes_file) as path, open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        # As `weights import` reads such a list: its own numbers are the places.
        if rows and "index" in rows[0]:
            rows.sort(key=lambda row: int(row["index"]))
        return [row["display_name"] for row in rows]
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise TrainingError(
            f"{classes_file}: no list of classes ({error}); a CSV with a column display_name"
        ) from error


def _clip_id(name: object) -> str:
    return str(name).removesuffix(".mp4")
