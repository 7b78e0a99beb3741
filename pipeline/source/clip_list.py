"""read_entries: the lines of VGGSound's CSV or of a manifest, each checked.

Knows nothing of the files it names or of the store. Invariant: a clip_id occurs once, clip_id and
split are names that a folder may have, a label is one line, and no entry reaches outside the folder
of videos.
"""

import csv
import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.source.entry import TRAIN, Entry, is_safe, refuse_label
from pipeline.source.manifest import MANIFEST_COLUMNS, manifest_entries, readable_table
from pipeline.storage import Location

_log = logging.getLogger(__name__)
_SAFE_ID = re.compile(r"[A-Za-z0-9_-]+")
_VGGSOUND_COLUMNS = ("ytid", "start", "label", "split")
_HEADER_WORDS = {*_VGGSOUND_COLUMNS, *MANIFEST_COLUMNS, "file", "filename", "path", "youtube_id"}
_MOST_PROBLEMS = 20
_USUAL_SPLITS = (TRAIN, "test")
"""Those that training and evaluation ask for."""


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
                table = readable_table(pq.read_table(file), clips)
            rows = enumerate(table.to_pylist(), 1)
            entries, is_manifest = (
                manifest_entries(rows, table.column_names, clips, base, problems),
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
        elif entry.end_s != other.end_s:
            told += ", with another end: tell them apart in a column clip_id"
        else:
            told += ": take one of the lines out"
        yield told


def refuse(problems: list[str]) -> None:
    """Raises: SourceError with a line for each problem, if there is one."""
    more = len(problems) - _MOST_PROBLEMS
    shown = problems[:_MOST_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
    if shown:
        raise SourceError("\n".join(shown))


def warn_of_misspellings(clips: str, entries: list[Entry]) -> None:
    """One warning for each label and split that looks misspelt; the clips are kept."""
    _warn_of_labels(clips, entries)
    _warn_of_splits(clips, entries)


def _warn_of_labels(clips: str, entries: list[Entry]) -> None:
    """A label that no training clip has is most likely misspelt."""
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


def _warn_of_splits(clips: str, entries: list[Entry]) -> None:
    """Clips of `Train` or `tests` would be in the store and never be used."""
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
        return manifest_entries(whole, header, clips, base, problems), True
    _refuse_other_header(first[1], clips)
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


def _refuse_other_header(first: list[str], clips: str) -> None:
    """Raises: SourceError for a header that is not a manifest's, in place of one for each line."""
    names = {name.strip().lower() for cell in first for name in re.split(r"[;\t|]", cell)}
    if names & _HEADER_WORDS and not (len(first) == 4 and re.match(r"\s*\d", first[1])):
        raise SourceError(
            f"{clips}: the first line is {','.join(first)!r}. Expected VGGSound's columns without "
            f"a header ({', '.join(_VGGSOUND_COLUMNS)}), or a manifest, whose header has uri and "
            f"may have {', '.join(MANIFEST_COLUMNS[1:])}, with commas between them"
        )


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
            lacks = "split is empty: expected train, test or another name"
            problems.append(f"{where}: the {lacks if label else 'label is empty'}")
        elif not is_safe(split):
            problems.append(
                f"{where}: {split!r} is not a split: it holds a path or a control character"
            )
        else:
            seconds = int(float(start))
            clip_id = f"{ytid}_{seconds:06d}"
            try:
                refuse_label(label)
            except ValueError as error:
                problems.append(f"{where}: {error}")
                continue
            yield Entry(line, clip_id, label, split, ytid, ytid, float(seconds))


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
