"""read_entries: the lines of VGGSound's CSV or of a manifest, each checked.

Knows nothing of the files it names or of the store. Invariant: a clip_id occurs once, clip_id and
split are names that a folder may have, a label is one line, and no entry reaches outside the folder
of videos.
"""

import csv
import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.source.tar_parts import CONTROL
from pipeline.storage import Location
from pipeline.store.schema import LABEL_SEPARATOR

_log = logging.getLogger(__name__)
_UNSAFE = "it holds a path or a control character"
_SAFE_ID = re.compile(r"[A-Za-z0-9_-]+")
_VGGSOUND_NAME = re.compile(r"([A-Za-z0-9_-]{11})_\d{6}")
_VGGSOUND_COLUMNS = ("ytid", "start", "label", "split")
_MANIFEST_COLUMNS = ("uri", "start_s", "end_s", "label", "labels", "split", "group", "clip_id")
_MOST_PROBLEMS = 20
TRAIN = "train"
"""The split of clips that are given none."""
_USUAL_SPLITS = (TRAIN, "test")
"""Those that training and evaluation ask for."""


@dataclass(frozen=True)
class Entry:
    """One line of a CSV or manifest."""

    line: int
    clip_id: str
    label: str | None
    """None for a clip without a label."""
    split: str
    group: str
    """What is not to be divided between training and validation: the video a clip was cut from."""
    ytid: str = ""
    start_s: float | None = None
    end_s: float | None = None
    uri: str = ""
    more_labels: tuple[str, ...] = ()
    """Classes of the clip beside `label`."""

    @property
    def all_labels(self) -> tuple[str, ...]:
        """Every class of the clip."""
        return (self.label, *self.more_labels) if self.label else ()


def clip_id_of(path: str) -> str:
    """The id of a clip by its path below the folder of videos: `a/0001.mp4` is `a__0001`."""
    parts = PurePosixPath(path.replace("\\", "_")).with_suffix("").parts
    return "__".join(part for part in parts if part not in ("/", "..", "."))


def group_of(name: str, otherwise: str) -> str:
    """The YouTube id of a name of VGGSound's form (11 characters, _, six digits)."""
    match = _VGGSOUND_NAME.fullmatch(name)
    return match[1] if match else otherwise


def read_entries(clips: str, base: str) -> tuple[list[Entry], bool]:
    """The lines of a CSV or Parquet file, checked. Returns them and whether it is a manifest.

    Args: base: URI of the folder that a manifest's clips have their ids below.
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
                _manifest_entries(rows, table.column_names, clips, base, problems),
                True,
            )
        else:
            with location.fs.open(location.path, "rt", encoding="utf-8-sig", newline="") as file:
                entries, is_manifest = _csv_entries(file, clips, base, problems)
    except FileNotFoundError:
        raise SourceError(f"{clips}: no such file") from None
    except IsADirectoryError:
        raise SourceError(
            f"{clips}: a folder, expected a CSV or Parquet list; clips themselves go to --videos"
        ) from None
    except (UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise SourceError(f"{clips}: cannot be read as UTF-8 CSV or Parquet: {error}") from error
    problems += _twice(entries, clips)
    refuse(problems)
    return entries, is_manifest


def _twice(entries: list[Entry], clips: str) -> Iterator[str]:
    first: dict[str, Entry] = {}
    for entry in entries:
        other = first.setdefault(entry.clip_id, entry)
        if other is entry:
            continue
        told = f"{clips} line {entry.line}: clip {entry.clip_id} is already on line {other.line}"
        if entry.uri and entry.uri != other.uri:
            told += (
                f" ({other.uri} there, {entry.uri} here): name with --videos the folder above "
                "both, or tell them apart in a column clip_id"
            )
        else:
            told += ": take one of the lines out"
        yield told


def refuse(problems: list[str]) -> None:
    """Raises: SourceError with a line for each problem, if there is one."""
    more = len(problems) - _MOST_PROBLEMS
    shown = problems[:_MOST_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
    if shown:
        raise SourceError("\n".join(shown))


def warn_of_unknown_labels(clips: str, entries: list[Entry]) -> None:
    """A label that no training clip has is most likely misspelt; the clips are kept."""
    known = {label for entry in entries if entry.split == TRAIN for label in entry.all_labels}
    unknown: dict[str, int] = {}
    for entry in entries:
        for label in entry.all_labels:
            if known and label not in known:
                unknown.setdefault(label, entry.line)
    for label, line in list(unknown.items())[:_MOST_PROBLEMS]:
        near = difflib.get_close_matches(label, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        _log.warning("%s line %d: no training clip has label %r%s", clips, line, label, hint)


def warn_of_misspelt_splits(clips: str, entries: list[Entry]) -> None:
    """Clips of `Train` or `tests` would be in the store and never be used; they are kept."""
    counts = Counter(entry.split for entry in entries)
    for split, n in counts.items():
        near = difflib.get_close_matches(split.lower(), _USUAL_SPLITS, n=1, cutoff=0.7)
        if near and split not in _USUAL_SPLITS:
            _log.warning(
                "%s: %d clips are of split %r, which nothing asks for by default; did you mean %r?",
                clips, n, split, near[0],
            )  # fmt: skip


def _csv_entries(
    file: Iterable[str], clips: str, base: str, problems: list[str]
) -> tuple[list[Entry], bool]:
    rows = _records(file, clips, problems)
    first = next(rows, None)
    # Without the first line nobody can say what the others are lines of.
    if first is None or problems:
        return [], False
    header = [name.strip() for name in first[1]]
    if "uri" in header:
        whole = (
            (line, dict(zip(header, (value.strip() for value in row), strict=True)))
            for line, row in rows
            if _is_whole(row, header, f"{clips} line {line}", problems)
        )
        return _manifest_entries(whole, header, clips, base, problems), True
    return list(_vggsound_entries(first, rows, clips, problems)), False


def _records(
    file: Iterable[str], clips: str, problems: list[str]
) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not blank: number, cells. A quote that is never closed takes the lines
    after it, up to the next quote, for a piece of its cell: they are a problem and no lines."""
    reader = csv.reader(file, skipinitialspace=True)
    before = 0
    while True:
        where = f"{clips} line {before + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.append(f"{where}: {error}; is a quote opened there and never closed?")
            return
        first, before = before + 1, reader.line_num
        if first < before:
            problems.append(
                f"{where}: a quote opened there reaches to line {before}; a clip is one line: "
                "close the quote, or take it out"
            )
        elif row:
            yield first, row


def _is_whole(row: list[str], columns: Sequence[str], where: str, problems: list[str]) -> bool:
    """Whether a line has a cell for each column. Otherwise nobody can say which cell is which: a
    label cut in two would move a piece of it into the split."""
    if len(row) != len(columns):
        problems.append(
            f"{where}: {len(row)} columns, expected {len(columns)} ({', '.join(columns)}); "
            "a label with a comma needs quotes"
        )
    return len(row) == len(columns)


def _vggsound_entries(
    first: tuple[int, list[str]],
    rest: Iterator[tuple[int, list[str]]],
    clips: str,
    problems: list[str],
) -> Iterator[Entry]:
    for line, row in _chain(first, rest):
        where = f"{clips} line {line}"
        if not _is_whole(row, _VGGSOUND_COLUMNS, where, problems):
            continue
        ytid, start, label, split = (value.strip() for value in row)
        if not _SAFE_ID.fullmatch(ytid):
            problems.append(f"{where}: {ytid!r} is not a video id (letters, digits, _ and -)")
        elif not re.fullmatch(r"\d{1,6}(\.0*)?", start):
            problems.append(f"{where}: start {start!r} is not a whole number of seconds")
        elif not label or not split:
            problems.append(f"{where}: the {'split' if label else 'label'} is empty")
        elif re.search(CONTROL, label):
            problems.append(f"{where}: {_not_a_label(label)}")
        elif not _is_safe(split):
            problems.append(
                f"{where}: {split!r} is not a split: it holds a path or a control character"
            )
        else:
            seconds = int(float(start))
            clip_id = f"{ytid}_{seconds:06d}"
            yield Entry(line, clip_id, label, split, ytid, ytid, float(seconds))


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _manifest_entries(
    rows: Iterable[tuple[int, dict[str, Any]]],
    header: list[str],
    clips: str,
    base: str,
    problems: list[str],
) -> list[Entry]:
    if "uri" not in header or any(name not in _MANIFEST_COLUMNS for name in header):
        raise SourceError(
            f"{clips}: columns are {', '.join(header)}; a manifest has uri and may have "
            f"{', '.join(_MANIFEST_COLUMNS[1:])}"
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
    uri, group, clip_id = (_text(row.get(name)) for name in ("uri", "group", "clip_id"))
    labels = _labels(row)
    split = _text(row["split"]) if "split" in row else TRAIN
    for name, value in (("uri", uri), ("split", split)):
        if not value:
            raise ValueError(f"the {name} is empty")
    if "\0" in uri:
        raise ValueError(f"{uri!r} is no uri")
    is_relative = "://" not in uri and not uri.startswith("/")
    if is_relative and ".." in PurePosixPath(uri).parts:
        raise ValueError(f"{uri!r} reaches outside the folder of videos")
    start_s, end_s = (_seconds(name, row.get(name)) for name in ("start_s", "end_s"))
    if end_s is not None and end_s <= (start_s or 0.0):
        raise ValueError(f"end_s {end_s:g} is not after start_s {start_s or 0:g}")
    if not clip_id:
        is_below = is_relative or uri.startswith(f"{base}/")
        clip_id = clip_id_of(uri.removeprefix(f"{base}/") if is_below else PurePosixPath(uri).name)
        if start_s is not None:
            clip_id += f"_{start_s:06.0f}" if start_s == int(start_s) else f"_{start_s:010.3f}"
    for name, value in (("clip_id", clip_id), ("split", split)):
        if not _is_safe(value):
            raise ValueError(f"{value!r} is not a {name}: {_UNSAFE}")
    group = group or group_of(PurePosixPath(uri).stem, group_of(clip_id, uri))
    label, more_labels = (labels[0], tuple(labels[1:])) if labels else (None, ())
    return Entry(
        line, clip_id, label, split, group, "", start_s, end_s, uri, more_labels=more_labels
    )


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
    if wrong := [label for label in labels if re.search(CONTROL, label)]:
        raise ValueError(_not_a_label(wrong[0]))
    return labels


def _not_a_label(label: str) -> str:
    return f"label {label!r} holds a control character; take it out: a label is one line of text"


def _text(value: Any) -> str:
    """A cell as a CSV would hold it; "" where there is none. Parquet has numbers as such: 0 is one,
    and whole ones of which some are missing come out of pandas as floats."""
    if _is_missing(value):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _is_missing(value: Any) -> bool:
    """None, or the NaN that pandas has for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_safe(name: str) -> bool:
    """Whether a name can be that of a folder: `store export` makes one of it."""
    return re.fullmatch(r"[^/\\\x00-\x1f\x7f]+", name) is not None and name not in (".", "..")


def _seconds(name: str, value: Any) -> float | None:
    if _is_missing(value) or value == "":
        return None
    try:
        seconds = float(value)
    except ValueError:
        raise ValueError(f"{name} {value!r} is not a number") from None
    if not 0 <= seconds < 1e7:
        raise ValueError(f"{name} {value!r} is not a time in a video")
    return seconds
