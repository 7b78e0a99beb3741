"""Location: a folder on a disk or in an object store, behind one interface.

Knows nothing of features or clips. Invariant: what `publish` and `write_bytes` put at a path
appears there whole or not at all.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import StoreError

_LIBRARIES = ("aiohttp", "botocore", "deltalake", "gcsfs", "google")


class Location:
    """A folder at a URI: a local path, file://, s3://, gs:// or anything else fsspec opens.

    Object stores take credentials and the endpoint (AWS_ENDPOINT_URL, STORAGE_EMULATOR_HOST) from
    the environment.
    """

    def __init__(self, uri: str) -> None:
        """Raises: StoreError if fsspec knows no such kind of place, or lacks the package for it."""
        # Listings are never cached: another process may write to the same place.
        try:
            self.fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"{uri}: {error}. A local path, s3:// and gs:// always work; other kinds of place "
                "need the package that fsspec names for them."
            ) from error
        self.path = path.rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.uri = self.path if self.is_local else uri.rstrip("/")

    def join(self, *parts: str) -> str:
        """Path below this folder, in the form `fs` takes."""
        return "/".join((self.path, *parts))

    def ls(self, folder: str = "") -> list[dict[str, Any]]:
        """Files (not folders) directly in `folder`: fsspec info dicts; none if it is not there."""
        try:
            entries = self.fs.ls(self.join(folder) if folder else self.path, detail=True)
        except FileNotFoundError:
            return []
        return [entry for entry in entries if entry["type"] == "file"]

    def modified(self, entry: dict[str, Any]) -> float:
        """Time of modification (Unix, s) of an entry of `ls`; no request where the listing has it,
        which s3://, gs:// and local folders have."""
        for name in ("LastModified", "mtime", "updated", "last_modified"):
            told = entry.get(name)
            if isinstance(told, str):
                told = datetime.fromisoformat(told)
            if isinstance(told, datetime):
                return told.timestamp()
            if told is not None:
                return float(told)
        modified: datetime = self.fs.modified(entry["name"])
        return modified.timestamp()

    def read_bytes(self, name: str) -> bytes:
        """Content of a file.

        Raises: FileNotFoundError.
        """
        content: bytes = self.fs.cat_file(self.join(name))
        return content

    def write_bytes(self, name: str, data: bytes) -> None:
        """Create or replace a file."""
        if self.is_local:
            scratch = self.join(f"{name}.{uuid.uuid4().hex}.tmp")
            os.makedirs(os.path.dirname(scratch), exist_ok=True)
            try:
                with open(scratch, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(scratch, self.join(name))
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(scratch)
                raise
        else:
            self.fs.pipe_file(self.join(name), data)

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Create a file unless it exists. Returns whether this call created it (atomic)."""
        if self.is_local:
            scratch = Path(self.join(f"{name}.{uuid.uuid4().hex}.tmp"))
            scratch.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(data)
            try:
                os.link(scratch, self.join(name))
            except FileExistsError:
                return False
            finally:
                scratch.unlink()
            return True
        try:
            self.fs.pipe_file(self.join(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Delete a file; nothing happens if it is not there."""
        try:
            self.fs.rm_file(self.join(name))
        except FileNotFoundError:
            return

    def remove_all(self, names: list[str]) -> None:
        """Delete files; object stores take about a thousand in a request."""
        if self.is_local:
            for name in names:
                self.remove(name)
        elif names:
            self.fs.rm([self.join(name) for name in names])

    def publish(self, local_file: str, name: str) -> None:
        """Move a finished local file to `name`."""
        if self.is_local:
            with open(local_file, "rb") as file:
                os.fsync(file.fileno())
            os.replace(local_file, self.join(name))
        else:
            self.fs.put_file(local_file, self.join(name))
            os.unlink(local_file)


def is_storage_failure(error: BaseException) -> bool:
    """Whether a disk, a bucket or the way to it failed: an OSError, or what the libraries of object
    stores raise in its place."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _LIBRARIES


@contextlib.contextmanager
def storage_failures_ignored() -> Iterator[None]:
    """A block that ends quietly where storage fails; other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_storage_failure(error):
            raise


def is_refusal(error: BaseException) -> bool:
    """Whether storage answers, and denies this one file (gcsfs says so in a plain OSError)."""
    return isinstance(error, PermissionError) or str(error).startswith("Forbidden")


def delta_options() -> dict[str, str]:
    """Storage options of the Delta library, which reads credentials from the environment itself.

    It needs to be told that an endpoint may be plain http, and knows no STORAGE_EMULATOR_HOST.
    """
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    options = {}
    if emulator:
        nobody = {"client_email": "", "private_key": "", "private_key_id": ""}
        account = {"gcs_base_url": emulator, "disable_oauth": True, **nobody}
        options["google_service_account_key"] = json.dumps(account)
    if emulator or os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["allow_http"] = "true"
    return options
