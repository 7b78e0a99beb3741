"""find_videos: the videos below a folder or bucket, inside tar parts too, each with a fingerprint.

Knows nothing of lists of clips or of the store. Invariant: what cannot be read costs one warning
and is named in the result, so that nobody takes it for gone; everything else is found.
"""

import hashlib
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pipeline.errors import SourceError
from pipeline.source.tar_parts import (
    CONTROL,
    PART_SUFFIXES,
    SEPARATOR,
    PartIndex,
    index_parts,
    is_part,
    is_utf8,
    part_of,
    readable,
)
from pipeline.storage import Location

VIDEO_SUFFIXES = frozenset(
    {".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv"}
) | {".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv"}
_NO_VIDEOS = frozenset({".csv", ".jpg", ".json", ".md", ".parquet", ".png", ".srt", ".txt", ".vtt"})
"""Endings of what people keep beside clips, which nobody misses in a store."""
_MOST_WARNINGS = 20
_MOST_KINDS = 8
_NOT_UTF8 = "its name is not UTF-8"
_HOLDS_CONTROL = "its name holds a control character"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    """A file of the source and what tells whether it changed."""

    uri: str
    size: int
    mtime_ns: int
    fp_kind: str
    fp: str


class Found(NamedTuple):
    """A video and where it lies."""

    path: str
    """Below the folder, suffix included; of a member, below the part's path without its suffix."""
    file: File
    is_member: bool = False
    """Whether it lies in a tar part."""


class Videos(NamedTuple):
    """What is in a folder."""

    found: list[Found]
    unreadable: list[str]
    """Paths of folders and files that are there and could not be looked at."""
    damaged: dict[str, frozenset[str]]
    """URIs of tar parts that cannot be read to their end: the URIs of the members that can."""


def find_videos(videos: str, cache: Location | None) -> Videos:
    """All videos below a folder, in tar parts too, or in one tar part.

    Hidden files and folders are left out, in a part as on a disk: a Mac writes one beside each
    clip, NFS keeps snapshots in one. Args: cache: where the index of parts is kept.
    Raises: SourceError if there is no such folder.
    """
    location = Location(videos)
    walk = _Walk(location.path)
    if is_part(videos) and location.fs.isfile(location.path):
        walk.parts.append((PurePosixPath(location.path).name, part_file(videos)))
    elif location.fs.isfile(location.path):
        raise SourceError(
            f"{videos}: a file, expected a folder of videos or a tar part. Name the folder it is "
            "in, or list it in a manifest (--clips)"
        )
    elif not location.fs.isdir(location.path):
        raise SourceError(f"{videos}: no such folder")
    elif location.is_local:
        walk.local(location.path, frozenset())
    else:
        walk.remote(location)
    walk.read_parts(cache)
    walk.tell_of_others(videos)
    if walk.n_warnings > _MOST_WARNINGS:
        _log.warning("%s: ... and %d more", videos, walk.n_warnings - _MOST_WARNINGS)
    return Videos(walk.found, walk.unreadable, walk.damaged)


def part_file(uri: str) -> File:
    """A tar part as it is now. Raises: FileNotFoundError."""
    location = Location(uri)
    if location.is_local:
        return local_file(location.path, os.stat(location.path))
    return remote_file(uri, location.fs.info(location.path))


def member_file(uri: str, size: int, part: File) -> File:
    """A member of a tar part, which changes with its part."""
    return File(uri, size, part.mtime_ns, part.fp_kind, f"{part.fp}-{size}")


class _Walk:
    """A walk below one folder, and what it came upon."""

    def __init__(self, top: str) -> None:
        self.found: list[Found] = []
        self.parts: list[tuple[str, File]] = []
        self.unreadable: list[str] = []
        self.damaged: dict[str, frozenset[str]] = {}
        self.n_warnings = 0
        self._others: Counter[str] = Counter()
        self._prefix = f"{top}/"

    def local(self, folder: str, above: frozenset[tuple[int, int]]) -> None:
        """Args: above: device and inode of the folders on the way here; a link to one of them
        would be walked without end."""
        try:
            stat = os.stat(folder)
            here = (stat.st_dev, stat.st_ino)
            if here in above:
                self._warn(folder, "a link to a folder above it")
                return
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            self._set_aside(folder, error.strerror or str(error))
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    self.local(entry.path, above | {here})
                elif _is_wanted(entry.name) and not entry.is_file():
                    # Whoever opens a pipe waits for its other end. A dangling link ends here, too.
                    os.stat(entry.path)
                    self._warn(entry.path, "a pipe, socket or device")
                elif _is_wanted(entry.name):
                    self._take(entry.path, local_file(entry.path, entry.stat()))
                else:
                    self._note_other(entry.name)
            except FileNotFoundError:
                self._warn(entry.path, "a link to a file that is not there")
            except OSError as error:
                self._set_aside(entry.path, error.strerror or str(error))

    def remote(self, location: Location) -> None:
        """All objects below a folder of an object store."""
        for path, info in location.fs.find(location.path, detail=True).items():
            if _is_hidden(path.removeprefix(self._prefix)):
                continue
            if _is_wanted(path):
                self._take(path, remote_file(location.fs.unstrip_protocol(path), info))
            else:
                self._note_other(path)

    def _take(self, path: str, file: File) -> None:
        below = path.removeprefix(self._prefix)
        if not is_utf8(path):
            self._warn(readable(path), _NOT_UTF8)
        elif re.search(CONTROL, below):
            self._warn(repr(path), _HOLDS_CONTROL)
        elif is_part(path):
            self.parts.append((below, file))
        elif part_of(path):
            self._warn(path, "its path reads as that of a member of a tar part; rename it")
        else:
            self.found.append(Found(below, file))

    def read_parts(self, cache: Location | None) -> None:
        """The videos inside the tar parts that were come upon."""
        indexes = index_parts([(p.uri, p.fp, p.size) for _, p in self.parts], cache)
        for (path, part), index in zip(self.parts, indexes, strict=True):
            if index.is_refused:
                self._set_aside(part.uri, index.damage)
            elif index.damage:
                self._note_damage(part.uri, index)
            suffix = next(suffix for suffix in PART_SUFFIXES if path.lower().endswith(suffix))
            folder = path[: -len(suffix)]
            seen: set[str] = set()
            for name in index.not_utf8:
                if _is_wanted_member(name):
                    self._warn(f"{part.uri}{SEPARATOR}{name}", _NOT_UTF8)
            for member, size in zip(index.members, index.sizes, strict=True):
                # Of two members of one name the first is read.
                if not _is_wanted_member(member) or member in seen:
                    continue
                seen.add(member)
                uri = f"{part.uri}{SEPARATOR}{member}"
                if re.search(CONTROL, member):
                    self._warn(repr(uri), _HOLDS_CONTROL)
                    continue
                file = member_file(uri, size, part)
                self.found.append(Found(f"{folder}/{member}", file, is_member=True))

    def tell_of_others(self, videos: str) -> None:
        """One line about files whose endings are none of a video."""
        if self._others:
            most = [f"{kind} {n:,}" for kind, n in self._others.most_common(_MOST_KINDS)]
            more = ["..."] if len(self._others) > _MOST_KINDS else []
            _log.info(
                "%s: %d files are left alone, their endings are none of a video: %s",
                videos, self._others.total(), ", ".join(most + more),
            )  # fmt: skip

    def _note_other(self, name: str) -> None:
        kind = os.path.splitext(name)[1].lower()
        if kind not in _NO_VIDEOS:
            self._others[readable(kind) or "none"] += 1

    def _note_damage(self, part: str, index: PartIndex) -> None:
        _log.warning(
            "%s: %s; its clips in the store that lie behind that stay as they are, others are "
            "missing: copy the part again", part, index.damage,
        )  # fmt: skip
        self.damaged[part] = frozenset(f"{part}{SEPARATOR}{member}" for member in index.members)

    def _set_aside(self, path: str, why: str) -> None:
        self.unreadable.append(path)
        self._warn(path, f"{why}; its clips in the store stay as they are")

    def _warn(self, path: str, why: str) -> None:
        self.n_warnings += 1
        if self.n_warnings <= _MOST_WARNINGS:
            _log.warning("%s: skipped: %s", path, why)


def _is_wanted(name: str) -> bool:
    return is_video(name) or is_part(name)


def _is_wanted_member(member: str) -> bool:
    """Whether a member of a part is a video that would be found if it lay in a folder."""
    return is_video(member) and not _is_hidden(member)


def _is_hidden(below: str) -> bool:
    """Whether a file is hidden, or a folder on the way to it. Members may begin with `./`."""
    parts = PurePosixPath(below).parts
    return any(part.startswith(".") and part != ".." for part in parts)


def is_video(name: str) -> bool:
    """Whether a file name is that of a video."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


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
