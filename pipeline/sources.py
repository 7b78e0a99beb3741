"""Which clips there are, and the fingerprint of each one's file.

Reads VGGSound's CSV beside a folder of videos, or a manifest of URIs. Knows nothing of the store
or of decoding. Invariant: a clip_id occurs once, and no entry reaches outside the folder given.
"""

import csv
import difflib
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.parts import SEPARATOR, index_parts, is_part
from pipeline.schema import SOURCE_SCHEMA
from pipeline.storage import Location

_VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"}
) | {".ogv", ".ts", ".webm", ".wmv"}
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


@dataclass(frozen=True)
class File:
    """A file of the source and what tells whether it changed."""

    uri: str
    size: int
    mtime_ns: int
    fp_kind: str
    fp: str


def list_sources(clips: str, videos: str | None, cache: Location | None = None) -> pa.Table:
    """All clips of a CSV or manifest with the files found for them (schema.SOURCE_SCHEMA).

    Args: clips: VGGSound CSV (no header: ytid, start, label, split) or a CSV/Parquet manifest with
        columns uri, start_s, end_s, label, split[, clip_id]; videos: folder of the clips, or of
        tar parts with them, or one tar part; cache: where the index of parts is kept.
    Raises: SourceError, one line per problem.
    """
    entries, is_manifest = read_entries(clips)
    if not entries:
        raise SourceError(f"{clips}: no clips listed")
    if is_manifest:
        base = videos if videos is not None else str(PurePosixPath(Location(clips).uri).parent)
        found = _find_manifest_files(entries, base)
    else:
        if videos is None:
            raise SourceError(f"{clips}: give the folder of its clips with --videos")
        found = _find_clip_files(entries, videos, cache)
    if not any(file for file, _ in found):
        raise SourceError(
            f"{videos or clips}: none of the {len(entries)} clips of {clips} has a file there "
            f"(expected names like {entries[0].clip_id}.mp4). Is it mounted, and the right folder?"
        )
    return _as_table(entries, found)


def _as_table(entries: list[Entry], found: list[tuple[File | None, float | None]]) -> pa.Table:
    files = [file for file, _ in found]
    columns: dict[str, list[Any]] = {
        "clip_id": [entry.clip_id for entry in entries],
        "uri": [
            file.uri if file else entry.uri for file, entry in zip(files, entries, strict=True)
        ],
        "start_s": [start_s for _, start_s in found],
        "end_s": [entry.end_s for entry in entries],
        "label": [entry.label for entry in entries],
        "split": [entry.split for entry in entries],
        "fp_kind": [file.fp_kind if file else None for file in files],
        "fp": [file.fp if file else None for file in files],
        "size": [file.size if file else None for file in files],
        "mtime_ns": [file.mtime_ns if file else None for file in files],
    }
    return pa.table(columns, schema=SOURCE_SCHEMA)


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


def _find_clip_files(
    entries: list[Entry], videos: str, cache: Location | None
) -> list[tuple[File | None, float | None]]:
    """The file of each clip, with the start when the file is the untrimmed video."""
    by_stem: dict[str, File] = {}
    parts: list[File] = []
    for stem, file in _walk(Location(videos), videos):
        if is_part(file.uri):
            parts.append(file)
            continue
        other = by_stem.setdefault(stem, file)
        if other is not file:
            raise SourceError(f"{videos}: {other.uri} and {file.uri} are named alike; keep one")
    for stem, file in _members(parts, cache):
        by_stem.setdefault(stem, file)
    found: list[tuple[File | None, float | None]] = []
    for entry in entries:
        trimmed = by_stem.get(entry.clip_id)
        untrimmed = None if trimmed else by_stem.get(entry.ytid)
        found.append((trimmed or untrimmed, entry.start_s if untrimmed else None))
    return found


def _members(parts: list[File], cache: Location | None) -> Iterator[tuple[str, File]]:
    """Videos inside tar parts, by name without folder and suffix."""
    indexes = index_parts([(part.uri, part.fp) for part in parts], cache)
    for part, index in zip(parts, indexes, strict=True):
        if index.damage:
            _log.warning("%s: %s; clips behind that count as missing", part.uri, index.damage)
        for member, size in zip(index.members, index.sizes, strict=True):
            stem, suffix = os.path.splitext(member.rsplit("/", 1)[-1])
            if suffix.lower() in _VIDEO_SUFFIXES:
                uri = f"{part.uri}{SEPARATOR}{member}"
                yield stem, File(uri, size, part.mtime_ns, part.fp_kind, f"{part.fp}-{size}")


def _walk(location: Location, videos: str) -> Iterator[tuple[str, File]]:
    """Video files and tar parts anywhere below a folder, by name without suffix."""
    if is_part(videos) and location.fs.isfile(location.path):
        info = location.fs.info(location.path)
        if location.is_local:
            yield videos, local_file(location.path, os.stat(location.path))
        else:
            yield videos, remote_file(videos, info)
        return
    if not location.fs.isdir(location.path):
        raise SourceError(f"{videos}: no such folder")
    if location.is_local:
        yield from _walk_local(location.path)
        return
    for path, info in location.fs.find(location.path, detail=True).items():
        stem, suffix = os.path.splitext(path.rsplit("/", 1)[-1])
        if suffix.lower() in _VIDEO_SUFFIXES or is_part(path):
            yield stem, remote_file(location.fs.unstrip_protocol(path), info)


def _walk_local(folder: str) -> Iterator[tuple[str, File]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk_local(entry.path)
                continue
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in _VIDEO_SUFFIXES or is_part(entry.name):
                yield stem, local_file(entry.path, entry.stat())


def sha256_of(path: str) -> str:
    """Hex SHA-256 of a local file's content."""
    with open(path.removeprefix("file://"), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_file(path: str, stat: os.stat_result) -> File:
    """A local file, fingerprinted by size and time of modification."""
    return File(path, stat.st_size, stat.st_mtime_ns, "stat", f"{stat.st_size}-{stat.st_mtime_ns}")


def remote_file(uri: str, info: dict[str, Any]) -> File:
    """An object, fingerprinted by its etag, or by size and time where there is none."""
    size = int(info.get("size") or 0)
    stamp = str(info.get("LastModified") or info.get("mtime") or info.get("updated") or "")
    etag = str(info.get("ETag") or info.get("etag") or "").strip('"')
    return File(uri, size, 0, "etag" if etag else "stat", f"{size}-{etag or stamp}")


def _find_manifest_files(entries: list[Entry], base: str) -> list[tuple[File | None, float | None]]:
    """The file of each entry; folders of object stores are listed once, not asked per file."""
    folders: dict[str, dict[str, File]] = {}
    found: list[tuple[File | None, float | None]] = []
    for entry in entries:
        is_relative = "://" not in entry.uri and not entry.uri.startswith("/")
        uri = f"{base.rstrip('/')}/{entry.uri}" if is_relative else entry.uri
        found.append((_manifest_file(uri, folders), entry.start_s))
    return found


def _manifest_file(uri: str, folders: dict[str, dict[str, File]]) -> File | None:
    if "://" not in uri or uri.startswith("file://"):
        path = uri.removeprefix("file://")
        try:
            return local_file(path, os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
    folder, _, name = uri.rpartition("/")
    if folder not in folders:
        location = Location(folder)
        folders[folder] = {
            info["name"].rsplit("/", 1)[-1]: remote_file(
                f"{folder}/{info['name'].rsplit('/', 1)[-1]}", info
            )
            for info in location.ls()
        }
    return folders[folder].get(name)
