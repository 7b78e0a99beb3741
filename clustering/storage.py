"""Small atomic files at any URI: local path, s3://, gs://, ...

Knows nothing of what the files hold. Invariant: a file that can be seen is whole; object stores
write in one put, local files are renamed into place.
"""

import contextlib
import copy
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any

import fsspec
import numpy as np

_log = logging.getLogger(__name__)

ATTEMPTS = 11
_ONE_REQUEST = {
    "retries": {"total_max_attempts": 1},
    "connect_timeout": 2,
    "read_timeout": 30,
}
_TOLD_EVERY_S = 60.0

MayWrite = Callable[[], None]
"""Raises where another driver has taken the place over: called before each file of a pool, whose
actors may outlive the driver they belong to. Picklable."""


def always() -> None:
    """The `MayWrite` of a place that is the caller's alone."""


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts appended."""
    return "/".join([uri.rstrip("/"), *parts])


def open_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem and the path in it, as patient as `pipeline.patience` makes it: what is said
    there holds here."""
    options: dict[str, Any] = {"use_listings_cache": False}
    kind = fsspec.utils.get_protocol(uri)
    if kind in ("s3", "s3a"):
        import s3fs

        s3fs.S3FileSystem.retries = ATTEMPTS
        s3fs.core.set_custom_error_handler(_may_pass)
        s3fs.core.S3_RETRYABLE_ERRORS = ()
        options["config_kwargs"] = copy.deepcopy(_ONE_REQUEST)  # botocore adds to it.
    elif kind in ("gs", "gcs"):
        _tell_what_google_repeats()
    filesystem, path = fsspec.core.url_to_fs(uri, **options)
    return filesystem, path


@contextlib.contextmanager
def opened(uri: str) -> Iterator[IO[bytes]]:
    """A file to read parts of. Raises: FileNotFoundError."""
    filesystem, path = open_filesystem(uri)
    with filesystem.open(path, "rb") as handle:
        yield handle


def _may_pass(error: BaseException) -> bool:
    import botocore.exceptions as botocore
    from aiohttp import ClientPayloadError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import IncompleteRead

    if isinstance(error, botocore.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        passes = bool(status >= 500 or status == 429)
    else:
        unheard = botocore.ConnectionError, botocore.HTTPClientError, TimeoutError
        cut_short = ClientPayloadError, IncompleteRead, ResponseParserError
        passes = isinstance(error, (*unheard, *cut_short))
    if passes:
        _tell(error)
    return passes


def _tell_what_google_repeats() -> None:
    import gcsfs.retry

    decide = gcsfs.retry.is_retriable
    if decide.__module__ != gcsfs.retry.__name__:
        return  # Told already, also where pipeline.patience was first.

    def decide_and_tell(error: BaseException) -> bool:
        passes = bool(decide(error))
        if passes:
            _tell(error)
        return passes

    gcsfs.retry.is_retriable = decide_and_tell


_told_at = -_TOLD_EVERY_S


def _tell(error: BaseException) -> None:
    global _told_at
    if time.monotonic() - _told_at >= _TOLD_EVERY_S:
        _told_at = time.monotonic()
        _log.warning("waiting for storage: %s; trying again", error)


def write_bytes(uri: str, payload: bytes | memoryview) -> None:
    """Write a whole file, replacing an older one."""
    filesystem, path = open_filesystem(uri)
    if "file" in filesystem.protocol:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        staged = f"{path}.{uuid.uuid4().hex}.tmp"
        with open(staged, "wb") as handle:
            handle.write(payload)
        os.replace(staged, path)
    else:
        filesystem.pipe_file(path, bytes(payload))


def read_bytes(uri: str) -> bytes:
    """The file's bytes. Raises FileNotFoundError."""
    filesystem, path = open_filesystem(uri)
    payload: bytes = filesystem.cat_file(path)
    return payload


def exists(uri: str) -> bool:
    """Whether there is a file or folder at `uri`."""
    filesystem, path = open_filesystem(uri)
    return bool(filesystem.exists(path))


def names(uri: str) -> list[str]:
    """Sorted names of what lies in a folder; empty if there is none. Staged files are left out."""
    filesystem, path = open_filesystem(uri)
    if not filesystem.exists(path):
        return []
    found = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(path, detail=False))
    return sorted(name for name in found if not name.endswith(".tmp"))


def remove(uri: str) -> None:
    """Remove a file or folder if it is there."""
    filesystem, path = open_filesystem(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file."""
    write_bytes(uri, json.dumps(value, indent=1, sort_keys=True).encode())


def read_json(uri: str) -> Any:
    """Read a JSON file. Raises FileNotFoundError."""
    return json.loads(read_bytes(uri))


def write_arrays(uri: str, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as an uncompressed .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(uri, buffer.getbuffer())


def read_arrays(uri: str) -> dict[str, np.ndarray]:
    """Read a .npz file. Raises FileNotFoundError."""
    with np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
