"""named_clips: clips that are named one by one, as on a command line, each with its file.

Knows nothing of lists, labels or the store. Invariant: every name comes out, in its order, and one
that cannot be found is that clip's own reason.
"""

import os
import stat
from collections.abc import Iterable
from typing import Any, NamedTuple

from pipeline.errors import StoreError
from pipeline.reasons import Reason, Rejected
from pipeline.source.files import File, find_videos, local_file, remote_file
from pipeline.source.tar_parts import is_part, is_utf8, readable
from pipeline.storage import Location, is_storage_failure


class NamedClip(NamedTuple):
    """A clip as it was named, and what fetching it needs."""

    name: str
    clip: dict[str, Any]
    """A row as `fetch_all` takes it; {} if it was rejected."""
    rejected: Rejected | None = None


def named_clips(names: Iterable[str]) -> list[NamedClip]:
    """Files, folders, tar parts and URIs of these; a folder or part gives each video in it.

    Raises: SourceError for a folder that cannot be walked.
    """
    return [clip for name in names for clip in _named(name)]


def _named(name: str) -> list[NamedClip]:
    if not is_utf8(name):
        # Neither a page nor a table could say whose answer it is.
        why = "its name is not UTF-8; rename it, or link to it by another name"
        return [NamedClip(readable(name), {}, Rejected(Reason.OPEN_FAILED, why))]
    try:
        location = Location(name)
        file = _file(location)
    except FileNotFoundError:
        return [NamedClip(name, {}, Rejected(Reason.MISSING, "no such file"))]
    except StoreError as error:
        return [NamedClip(name, {}, Rejected(Reason.OPEN_FAILED, str(error)))]
    except Exception as error:
        if not is_storage_failure(error):
            raise
        return [NamedClip(name, {}, Rejected(Reason.OPEN_FAILED, str(error)))]
    if file is not None and not is_part(name):
        return [NamedClip(name, _row(file))]
    found = sorted(find_videos(name, None).found, key=lambda one: one.path)
    if not found:
        return [NamedClip(name, {}, Rejected(Reason.MISSING, "no videos in this folder"))]
    return [NamedClip(f"{name.rstrip('/')}/{one.path}", _row(one.file)) for one in found]


def _file(location: Location) -> File | None:
    """The file at a place; None for a folder. Raises: FileNotFoundError."""
    if location.is_local:
        found = os.stat(location.path)
        if stat.S_ISDIR(found.st_mode):
            return None
        if not stat.S_ISREG(found.st_mode):
            # Whoever opens a pipe waits for its other end.
            raise OSError(f"{location.path} is neither file nor folder")
        return local_file(location.path, found)
    info = location.fs.info(location.path)
    return None if info["type"] == "directory" else remote_file(location.uri, info)


def _row(file: File) -> dict[str, Any]:
    return {
        "uri": file.uri,
        "start_s": None,
        "end_s": None,
        "fp": file.fp,
        "fp_kind": file.fp_kind,
        "size": file.size,
        "mtime_ns": file.mtime_ns,
    }
