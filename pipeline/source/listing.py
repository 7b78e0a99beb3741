"""Which clips there are, and the fingerprint of each one's file.

Finds the files of a clip list in folders, buckets and tar parts. Knows nothing of the store or of
decoding. Invariant: every listed clip comes out once, with its file or without.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.source.clip_list import Entry, read_entries
from pipeline.source.tar_parts import SEPARATOR, index_parts, is_part
from pipeline.storage import Location
from pipeline.store.schema import SOURCE_SCHEMA

_VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"}
) | {".ogv", ".ts", ".webm", ".wmv"}
_log = logging.getLogger(__name__)


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
