"""manifest_entries: the rows of a manifest, whose header has `uri`, each checked.

Knows nothing of CSV or Parquet files. Invariant: a cell is read as whoever wrote it means it, or is
refused; windows of one video are one group.
"""

import math
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.source.entry import (
    TRAIN,
    Entry,
    clip_id_of,
    group_of,
    group_of_window,
    is_safe,
    refuse_label,
)
from pipeline.source.tar_parts import part_of
from pipeline.store.schema import LABEL_SEPARATOR

MANIFEST_COLUMNS = ("uri", "start_s", "end_s", "label", "labels", "split", "group", "clip_id")
_types = pa.types
_BYTES = (_types.is_binary, _types.is_large_binary, _types.is_binary_view)
_TEXT = (_types.is_string, _types.is_large_string, _types.is_string_view)
_PLAIN = (*_TEXT, _types.is_integer, _types.is_floating, _types.is_null)
_LISTS = (_types.is_list, _types.is_large_list, _types.is_fixed_size_list)
_UNSAFE = "it holds a path or a control character"


def readable_table(table: pa.Table, clips: str) -> pa.Table:
    """A manifest's columns as types that `_text`, `_labels` and `_seconds` read.

    Raises: SourceError for a type that would become another text than whoever wrote it means.
    """
    for at, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if any(is_kind(kind) for is_kind in _BYTES):
            table = table.set_column(at, field.name, table.column(at).cast(pa.string()))
        elif field.name in MANIFEST_COLUMNS and not _is_readable(field.name, kind):
            allowed = "numbers" if field.name in ("start_s", "end_s") else "text"
            several = ", or lists of text" if field.name == "labels" else ""
            hint = "; several classes go to a column labels" if field.name == "label" else ""
            raise SourceError(
                f"{clips}: column {field.name} is of type {field.type}; it may be {allowed}"
                f"{several}{hint}"
            )
    return table


def _is_readable(name: str, kind: pa.DataType) -> bool:
    if name == "labels" and any(is_kind(kind) for is_kind in _LISTS):
        kind = kind.value_type
    is_plain = any(is_kind(kind) for is_kind in _PLAIN)
    return is_plain or (name in ("start_s", "end_s") and pa.types.is_decimal(kind))


def manifest_entries(
    rows: Iterable[tuple[int, dict[str, Any]]],
    header: list[str],
    clips: str,
    base: str,
    problems: list[str],
) -> list[Entry]:
    """The entries of (line, row), and a problem for each row that is none.

    Args: base: as read_entries takes it. Raises: SourceError for another header.
    """
    if "uri" not in header or any(name not in MANIFEST_COLUMNS for name in header):
        raise SourceError(
            f"{clips}: columns are {', '.join(header)}; a manifest has uri and may have "
            f"{', '.join(MANIFEST_COLUMNS[1:])}"
        )
    entries = []
    if "label" in header and "labels" in header:
        raise SourceError(
            f"{clips}: columns label and labels: keep one of them; labels holds all classes of a "
            f"clip, with {LABEL_SEPARATOR} between them"
        )
    for line, row in rows:
        try:
            entries.append(_manifest_entry(line, row, base))
        except ValueError as error:
            problems.append(f"{clips} line {line}: {error}")
    return entries


def _manifest_entry(line: int, row: dict[str, Any], base: str) -> Entry:
    """Raises: ValueError."""
    uri, group, given_id = (_text(row.get(name)) for name in ("uri", "group", "clip_id"))
    labels = _labels(row)
    split = _text(row["split"]) if "split" in row else TRAIN
    _refuse_place(uri)
    if not split:
        raise ValueError("the split is empty: expected train, test or another name")
    start_s, end_s = (_seconds(name, row.get(name)) for name in ("start_s", "end_s"))
    if end_s is not None and end_s <= (start_s or 0.0):
        raise ValueError(f"end_s {end_s:g} is not after start_s {start_s or 0:g}")
    clip_id = given_id or _made_up_id(uri, start_s, base)
    for name, value in (("clip_id", clip_id), ("split", split)):
        if not is_safe(value):
            raise ValueError(f"{value!r} is not a {name}: {_UNSAFE}")
    # Not by an id that was made up: it says where the window begins, and its form is for some only.
    group = group or group_of_window(PurePosixPath(uri).stem, group_of(given_id, uri))
    label, more_labels = (labels[0], tuple(labels[1:])) if labels else (None, ())
    return Entry(
        line, clip_id, label, split, group, "", start_s, end_s, uri, more_labels=more_labels
    )


def _refuse_place(uri: str) -> None:
    """Raises: ValueError for a place that no clip can be at."""
    if not uri:
        raise ValueError("the uri is empty")
    if "\0" in uri:
        raise ValueError(f"{uri!r} is no uri")
    if part_of(uri):
        raise ValueError(f"{uri!r} reads as a member of a tar part: rename the file")
    if _is_relative(uri) and ".." in PurePosixPath(uri).parts:
        raise ValueError(f"{uri!r} reaches outside the folder of videos")


def _is_relative(uri: str) -> bool:
    return "://" not in uri and not uri.startswith("/")


def _made_up_id(uri: str, start_s: float | None, base: str) -> str:
    """The id of a clip that was given none: by its path, and where its window begins."""
    is_below = _is_relative(uri) or uri.startswith(f"{base}/")
    clip_id = clip_id_of(uri.removeprefix(f"{base}/") if is_below else PurePosixPath(uri).name)
    if start_s is None:
        return clip_id
    return clip_id + (f"_{start_s:06.0f}" if start_s == int(start_s) else f"_{start_s:010.3f}")


def _labels(row: dict[str, Any]) -> list[str]:
    """The classes of a manifest's clip, none twice: `label`, or `labels`, which Parquet may hold as
    a list."""
    if "labels" in row:
        given = row["labels"]
        is_list = isinstance(given, list)
        parts = map(_text, given) if is_list else _text(given).split(LABEL_SEPARATOR)
        labels = list(dict.fromkeys(label for part in parts if (label := part.strip())))
        if wrong := [label for label in labels if LABEL_SEPARATOR in label]:
            raise ValueError(
                f"label {wrong[0]!r} holds {LABEL_SEPARATOR}, which stands between labels"
            )
    else:
        label = _text(row.get("label"))
        labels = [label] if label else []
    for label in labels:
        refuse_label(label)
    return labels


def _text(value: Any) -> str:
    """A cell as a CSV would hold it; "" where there is none. Parquet has numbers as such: 0 is one,
    and whole ones of which some are missing come out of pandas as floats."""
    if _is_missing(value):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _is_missing(value: Any) -> bool:
    """None, or the NaN that pandas has for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _seconds(name: str, value: Any) -> float | None:
    if _is_missing(value) or value == "":
        return None
    try:
        seconds = float(value)
    except ValueError:
        raise ValueError(f"{name} {value!r} is not a number") from None
    if not 0 <= seconds < 1e7:
        raise ValueError(f"{name} {value!r} is not a time in a video: seconds, from 0 on")
    return seconds
