"""The list of clips: the lines of VGGSound's CSV or of a manifest, each checked.

Knows nothing of the files it names or of the store. Invariant: a clip_id occurs once, and no entry
reaches outside the folder of videos.
"""

import csv
import difflib
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.storage import Location

_log = logging.getLogger(__name__)
_SAFE_ID = re.compile(r"[A-Za-z0-9_-]+")
_MANIFEST_COLUMNS = ("uri", "start_s", "end_s", "label", "split", "clip_id")
_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Entry:
    """One line of a CSV or manifest."""

    line: int
    clip_id: str
    label: str
    split: str
    ytid: str = ""
    start_s: float | None = None
    end_s: float | None = None
    uri: str = ""


def read_entries(clips: str) -> tuple[list[Entry], bool]:
    """The lines of a CSV or Parquet file, checked. Returns them and whether it is a manifest.

    Raises: SourceError.
    """
    location = Location(clips)
    problems: list[str] = []
    try:
        if location.path.endswith(".parquet"):
            with location.fs.open(location.path, "rb") as file:
                table = pq.read_table(file)
            rows = enumerate(table.to_pylist(), 1)
            entries, is_manifest = (
                _manifest_entries(rows, table.column_names, clips, problems),
                True,
            )
        else:
            with location.fs.open(location.path, "rt", encoding="utf-8-sig", newline="") as file:
                entries, is_manifest = _csv_entries(file, clips, problems)
    except FileNotFoundError:
        raise SourceError(f"{clips}: no such file") from None
    except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        raise SourceError(f"{clips}: cannot be read as UTF-8 CSV or Parquet: {error}") from error
    first_line: dict[str, int] = {}
    for entry in entries:
        other = first_line.setdefault(entry.clip_id, entry.line)
        if other != entry.line:
            problems.append(
                f"{clips} line {entry.line}: clip {entry.clip_id} is already on line {other}"
            )
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = problems[:_MOST_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
        raise SourceError("\n".join(shown))
    _warn_of_unknown_labels(clips, entries)
    return entries, is_manifest


def _warn_of_unknown_labels(clips: str, entries: list[Entry]) -> None:
    """A label that no training clip has is most likely misspelt; the clips are kept."""
    known = {entry.label for entry in entries if entry.split == "train"}
    unknown: dict[str, int] = {}
    for entry in entries:
        if known and entry.label not in known:
            unknown.setdefault(entry.label, entry.line)
    for label, line in list(unknown.items())[:_MOST_PROBLEMS]:
        near = difflib.get_close_matches(label, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        _log.warning("%s line %d: no training clip has label %r%s", clips, line, label, hint)


def _csv_entries(file: Iterable[str], clips: str, problems: list[str]) -> tuple[list[Entry], bool]:
    reader = csv.reader(file, skipinitialspace=True)
    rows = ((reader.line_num, row) for row in reader if row)
    first = next(rows, None)
    if first is None:
        return [], False
    header = [name.strip() for name in first[1]]
    if "uri" in header:
        named = (
            (line, dict(zip(header, (value.strip() for value in row), strict=False)))
            for line, row in rows
        )
        return _manifest_entries(named, header, clips, problems), True
    return list(_vggsound_entries(first, rows, clips, problems)), False


def _vggsound_entries(
    first: tuple[int, list[str]],
    rest: Iterator[tuple[int, list[str]]],
    clips: str,
    problems: list[str],
) -> Iterator[Entry]:
    for line, row in _chain(first, rest):
        where = f"{clips} line {line}"
        if len(row) != 4:
            problems.append(
                f"{where}: {len(row)} columns, expected 4 (ytid, start, label, split); "
                "a label with a comma needs quotes"
            )
            continue
        ytid, start, label, split = (value.strip() for value in row)
        if not _SAFE_ID.fullmatch(ytid):
            problems.append(f"{where}: {ytid!r} is not a video id (letters, digits, _ and -)")
        elif not re.fullmatch(r"\d{1,6}(\.0*)?", start):
            problems.append(f"{where}: start {start!r} is not a whole number of seconds")
        elif not label or not split:
            problems.append(f"{where}: the {'split' if label else 'label'} is empty")
        else:
            seconds = int(float(start))
            yield Entry(line, f"{ytid}_{seconds:06d}", label, split, ytid, float(seconds))


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _manifest_entries(
    rows: Iterable[tuple[int, dict[str, Any]]], header: list[str], clips: str, problems: list[str]
) -> list[Entry]:
    unknown = [name for name in header if name not in _MANIFEST_COLUMNS]
    lacking = [name for name in ("uri", "label", "split") if name not in header]
    if lacking or unknown:
        raise SourceError(
            f"{clips}: columns are {', '.join(header)}; a manifest has uri, label, split and may "
            "have start_s, end_s, clip_id"
        )
    entries = []
    for line, row in rows:
        try:
            entries.append(_manifest_entry(line, row))
        except ValueError as error:
            problems.append(f"{clips} line {line}: {error}")
    return entries


def _manifest_entry(line: int, row: dict[str, Any]) -> Entry:
    """Raises: ValueError."""
    uri, label, split = (str(row.get(name) or "") for name in ("uri", "label", "split"))
    for name, value in (("uri", uri), ("label", label), ("split", split)):
        if not value:
            raise ValueError(f"the {name} is empty")
    is_relative = "://" not in uri and not uri.startswith("/")
    if is_relative and ".." in PurePosixPath(uri).parts:
        raise ValueError(f"{uri!r} reaches outside the folder of videos")
    start_s, end_s = (_seconds(name, row.get(name)) for name in ("start_s", "end_s"))
    if end_s is not None and end_s <= (start_s or 0.0):
        raise ValueError(f"end_s {end_s:g} is not after start_s {start_s or 0:g}")
    clip_id = str(row.get("clip_id") or "")
    if not clip_id:
        clip_id = PurePosixPath(uri).stem
        if start_s is not None:
            clip_id += f"_{start_s:06.0f}" if start_s == int(start_s) else f"_{start_s:010.3f}"
    if not re.fullmatch(r"[^/\\\0]+", clip_id) or clip_id in (".", ".."):
        raise ValueError(f"{clip_id!r} is not a clip_id: it holds a path")
    return Entry(line, clip_id, label, split, "", start_s, end_s, uri)


def _seconds(name: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except ValueError:
        raise ValueError(f"{name} {value!r} is not a number") from None
    if not 0 <= seconds < 1e7:
        raise ValueError(f"{name} {value!r} is not a time in a video")
    return seconds
