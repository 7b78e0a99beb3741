"""list_sources: which clips there are, by a list or every video of a folder, with their files.

Joins clip_list and files; knows nothing of decoding. Invariant: every listed clip comes out once,
with its file or without, and nothing is taken for gone that merely could not be read.
"""

import itertools
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SourceError
from pipeline.source.clip_list import read_entries, warn_of_misspellings
from pipeline.source.entry import TRAIN, Entry, clip_id_of, group_of
from pipeline.source.files import VIDEO_SUFFIXES, File, Found, find_videos, local_file, remote_file
from pipeline.source.tar_parts import part_of
from pipeline.storage import Location
from pipeline.store.schema import LABEL_SEPARATOR, SOURCE_SCHEMA

_log = logging.getLogger(__name__)

_MOST_TOLD = 20
_LISTED_AT_ONCE = 16


_Files = list[tuple[File | None, float | None]]
"""The file of each clip, with the start when it is an untrimmed video."""
_Looked = tuple[_Files, list[str], dict[str, frozenset[str]]]
"""Also what was unreadable, and what is damaged."""


class Listing(NamedTuple):
    """The source as it is now."""

    clips: pa.Table
    """SOURCE_SCHEMA, unique clip_id."""
    unreadable: list[str]
    """Folders and files that are there and could not be looked at."""
    damaged: dict[str, frozenset[str]]
    """Tar parts that cannot be read to their end, as `Videos` has them."""

    def without_unreadable(self, states: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Source clips and store rows (with clip_id, uri) without those whose file lies where
        nothing could be read: whether they changed or went is not known."""
        if not (self.unreadable or self.damaged) or not len(states):
            return self.clips, states
        unreadable = set(self.unreadable)
        known_uris = states["uri"].fill_null("").to_pylist()
        hidden = np.array([not unreadable.isdisjoint(_places(uri)) for uri in known_uris], bool)
        behind = np.array([self._is_behind_damage(uri) for uri in known_uris], bool)
        # A clip of a damaged part may have come elsewhere meanwhile.
        there = self.clips["clip_id"].filter(pc.is_valid(self.clips["fp"])).combine_chunks()
        hidden |= behind & ~pc.is_in(states["clip_id"], value_set=there).to_numpy()
        ids = states["clip_id"].filter(pa.array(hidden)).combine_chunks()
        known = pc.is_in(self.clips["clip_id"], value_set=ids)
        return self.clips.filter(pc.invert(known)), states.filter(pa.array(~hidden))

    def unreadable_above(self, uris: list[str]) -> list[str]:
        """The unreadable places that any of these files lies at or below, or behind damage of."""
        places = {place for uri in uris for place in _places(uri)}
        damaged = [part for part in self.damaged if any(part_of(uri) == part for uri in uris)]
        return [place for place in self.unreadable if place in places] + damaged

    def _is_behind_damage(self, uri: str) -> bool:
        part = part_of(uri) if self.damaged else None
        return part in self.damaged and uri not in self.damaged[part]


def _places(uri: str) -> Iterator[str]:
    """Where a clip lies, as unreadable places are spelled: its file, its tar part, the folders
    above. Few, however many places there are to look for them in."""
    for place in {uri, part_of(uri) or uri}:
        path = place.removeprefix("file://")
        while path:
            yield path
            path = path.rpartition("/")[0]


def list_sources(
    clips: str | None,
    videos: str | None,
    cache: Location | None = None,
    *,
    label_from_folder: bool = False,
) -> Listing:
    """All clips of a CSV or manifest with the files found for them, or all videos of a folder.

    Args: clips: VGGSound CSV (no header: ytid, start, label, split) or a CSV/Parquet manifest with
        columns uri[, start_s, end_s, label or labels, split, group, clip_id]; None: the folder;
        videos: folder of the clips, or of tar parts with them, or one tar part; cache: where the
        index of parts is kept; label_from_folder: without a list, a clip's label is the name of the
        folder it lies in.
    Raises: SourceError, one line per problem.
    """
    if clips is None:
        if videos is None:
            raise SourceError("no source: give --videos FOLDER, or --clips LIST, or both")
        return _list_folder(videos, cache, label_from_folder)
    if label_from_folder:
        raise SourceError(f"{clips}: labels come from the list; leave out --label-from-folder")
    base = _base(clips, videos)
    entries, is_manifest = read_entries(clips, base)
    if not entries:
        raise SourceError(f"{clips}: no clips listed")
    warn_of_misspellings(clips, entries)
    if is_manifest:
        found, unreadable, damaged = _find_manifest_files(entries, base)
    else:
        if videos is None:
            raise SourceError(f"{clips}: give the folder of its clips with --videos")
        found, unreadable, damaged = _find_clip_files(entries, videos, cache)
    if not any(file for file, _ in found):
        expected = _uri_below(base, entries[0].uri or f"{entries[0].clip_id}.mp4")
        raise SourceError(
            f"{videos or clips}: none of the {len(entries)} clips of {clips} has a file (such as "
            f"{expected}). Is it mounted, and the right folder?"
        )
    return Listing(_as_table(entries, found), unreadable, damaged)


def local_clip(clips: str, videos: str | None) -> str | None:
    """The first clip of a manifest that is a file on this machine's file system, if there is one.

    Args: as list_sources. Raises: SourceError.
    """
    base = _base(clips, videos)
    entries, is_manifest = read_entries(clips, base)
    places = (_uri_below(base, entry.uri) for entry in entries if is_manifest)
    paths = (place.removeprefix("file://") for place in places)
    return next((path for path in paths if "://" not in path and os.path.isfile(path)), None)


def _base(clips: str, videos: str | None) -> str:
    """The folder that a manifest's relative paths lie below."""
    # As a path is spelled there: --videos may be relative where a manifest is not.
    return Location(videos).uri if videos is not None else Location(clips).uri.rpartition("/")[0]


def _list_folder(videos: str, cache: Location | None, label_from_folder: bool) -> Listing:
    """Every video of a folder as a clip of the train split."""
    found, unreadable, damaged = find_videos(videos, cache)
    if not found:
        raise SourceError(
            f"{videos}: no videos there. Is it mounted, and the right folder? Videos end in "
            f"{' '.join(sorted(VIDEO_SUFFIXES))}, or lie in tar parts"
        )
    by_id: dict[str, list[Found]] = {}
    for one in found:
        by_id.setdefault(clip_id_of(one.path), []).append(one)
    taken = _told_apart(videos, by_id, unreadable)
    if not taken:
        raise SourceError(f"{videos}: no video there with a name of its own; rename some")
    entries: list[Entry] = []
    for number, (clip_id, one) in enumerate(taken.items()):
        path = PurePosixPath(one.path)
        label = path.parent.name if label_from_folder else ""
        group = group_of(path.stem, one.path)
        entries.append(Entry(number, clip_id, label or None, TRAIN, group))
    n_top = sum(entry.label is None for entry in entries) if label_from_folder else 0
    if n_top:
        _log.warning("%s: %d clips lie in no folder below it and get no label", videos, n_top)
    clips = _as_table(entries, [(one.file, None) for one in taken.values()])
    return Listing(clips, unreadable, damaged)


def _told_apart(
    videos: str, by_id: dict[str, list[Found]], unreadable: list[str]
) -> dict[str, Found]:
    """The file of each clip that has one. Which of several is meant nobody can say: they are told,
    and what the store has of that clip stays as it is."""
    several = {clip_id: alike for clip_id, alike in by_id.items() if len(alike) > 1}
    for clip_id, alike in itertools.islice(several.items(), _MOST_TOLD):
        _log.warning(
            "%s: %s are all clip %s and left out: rename all but one, or tell them apart by a list "
            "(--clips)", videos, " and ".join(one.path for one in alike), clip_id,
        )  # fmt: skip
    if len(several) > _MOST_TOLD:
        _log.warning("%s: ... and %d more", videos, len(several) - _MOST_TOLD)
    unreadable += [one.file.uri for alike in several.values() for one in alike]
    return {clip_id: alike[0] for clip_id, alike in by_id.items() if clip_id not in several}


def _as_table(entries: list[Entry], found: _Files) -> pa.Table:
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
        "group": [entry.group for entry in entries],
        "more_labels": [LABEL_SEPARATOR.join(entry.more_labels) or None for entry in entries],
    }
    return pa.table(columns, schema=SOURCE_SCHEMA)


def _find_clip_files(entries: list[Entry], videos: str, cache: Location | None) -> _Looked:
    listed = {name for entry in entries for name in (entry.clip_id, entry.ytid)}
    alike: dict[str, list[Found]] = {}
    seen, unreadable, damaged = find_videos(videos, cache)
    for one in seen:
        others = alike.setdefault(PurePosixPath(one.path).stem, [])
        # A part may hold what lies beside it, too: the first is taken.
        if not others or not one.is_member:
            others.append(one)
    asked_for = {stem: files for stem, files in alike.items() if stem in listed}
    by_stem = _told_apart(videos, asked_for, unreadable)
    found: _Files = []
    for entry in entries:
        trimmed = by_stem.get(entry.clip_id)
        untrimmed = None if trimmed else by_stem.get(entry.ytid)
        one_file = trimmed or untrimmed
        found.append((one_file and one_file.file, entry.start_s if untrimmed else None))
    return found, unreadable, damaged


def _find_manifest_files(entries: list[Entry], base: str) -> _Looked:
    """Folders of object stores are listed once, not asked per file."""
    uris = [_uri_below(base, entry.uri) for entry in entries]
    folders = _listed(dict.fromkeys(map(_folder_of, itertools.filterfalse(_is_path, uris))))
    unreadable: list[str] = []
    warnings: list[str] = []
    found: _Files = []
    for entry, uri in zip(entries, uris, strict=True):
        if _is_path(uri):
            file = _stat(uri.removeprefix("file://"), unreadable, warnings)
        else:
            file = folders[_folder_of(uri)].get(uri)
        found.append((file, entry.start_s))
    for warning in warnings[:_MOST_TOLD]:
        _log.warning("%s", warning)
    if len(warnings) > _MOST_TOLD:
        _log.warning("%s: ... and %d more", base, len(warnings) - _MOST_TOLD)
    return found, unreadable, {}


def _uri_below(base: str, uri: str) -> str:
    """The place of a manifest's clip, whose uri may be relative to the folder of videos."""
    is_relative = "://" not in uri and not uri.startswith("/")
    return f"{base.rstrip('/')}/{uri}" if is_relative else uri


def _stat(path: str, unreadable: list[str], warnings: list[str]) -> File | None:
    """A local file. Args: unreadable, warnings: what is added to where it cannot be looked at."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            # Whoever opens a pipe waits for its other end.
            warnings.append(f"{path}: not a file; it counts as missing")
            return None
        return local_file(path, found)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        warnings.append(f"{path}: skipped: {error}; its clips in the store stay as they are")
        unreadable.append(path)
        return None


def _is_path(uri: str) -> bool:
    """Whether a clip lies on this machine's file system."""
    return "://" not in uri or uri.startswith("file://")


def _folder_of(uri: str) -> str:
    return uri.rpartition("/")[0]


def _listed(folders: Iterable[str]) -> dict[str, dict[str, File]]:
    """The files of folders of object stores by folder and URI. Several are asked at once: a data
    set with a folder for each clip is as many requests as it has clips."""
    places = {folder: Location(folder) for folder in folders}
    with ThreadPoolExecutor(_LISTED_AT_ONCE) as pool:
        return {
            folder: {
                (uri := f"{folder}/{info['name'].rsplit('/', 1)[-1]}"): remote_file(uri, info)
                for info in infos
            }
            for folder, infos in zip(places, pool.map(Location.ls, places.values()), strict=True)
        }
