"""Location: a folder on a disk or in an object store, behind one interface.

Knows nothing of features or clips. Invariant: what `publish` and `write_bytes` put at a path
appears there whole or not at all.
"""

import contextlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import StoreError
from pipeline.patience import DELTA_RETRIES, open_filesystem
from pipeline.scratch import scratch_folder, told_if_full

_LIBRARIES = ("_internal", "aiohttp", "botocore", "deltalake", "gcsfs", "google")
"""`_internal` is where deltalake says that its errors are from."""
_UNFINISHED = ".unfinished-"
_STAGED = re.compile(r"\.[0-9a-f]{32}\.tmp$")
"""Ends the name of a file that `write_bytes` or `create_bytes` has not put in its place yet."""
_ONE_SLASH = re.compile(r"[A-Za-z][\w+.-]*:/(?!/)")
_SLOW_S = 2.0
_BLOCK_BYTES = 2**16
"""Read at a time by `open`: a checkpoint's few numbers lie in two places of it."""


class Location:
    """A folder at a URI: a local path, file://, s3://, gs:// or anything else fsspec opens.

    Object stores take credentials and the endpoint (AWS_ENDPOINT_URL, STORAGE_EMULATOR_HOST) from
    the environment.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        """Raises: StoreError if fsspec knows no such kind of place, or lacks the package for it.

        And for `s3:/bucket`, which as a path would be the folder `./s3:/bucket`.
        """
        uri = os.fspath(uri)
        if _ONE_SLASH.match(uri):
            scheme, _, rest = uri.partition(":/")
            raise StoreError(f"{uri}: neither a path nor a URI; did you mean {scheme}://{rest}?")
        try:
            self.fs, path = open_filesystem(uri)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"{uri}: {error}. A local path, s3:// and gs:// always work; other kinds of place "
                "need the package that fsspec names for them."
            ) from error
        self.path = path.rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.uri = self.path if self.is_local else uri.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return Location, (self.uri,)  # Opened anew wherever it travels, with that place's keys.

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.rpartition("/")[2]

    @property
    def appends(self) -> bool:
        """Whether a file can grow here; in an object store it is replaced."""
        return self.is_local

    def join(self, *parts: str) -> str:
        """Path below this folder, in the form `fs` takes."""
        return "/".join((self.path, *parts))

    def uri_of(self, *parts: str) -> str:
        """URI of something below this folder."""
        return "/".join((self.uri, *parts))

    def below(self, *parts: str) -> "Location":
        """A folder in this one."""
        return Location(self.uri_of(*parts))

    def ls(self, folder: str = "") -> list[dict[str, Any]]:
        """Files (not folders) directly in `folder`: fsspec info dicts; none if it is not there."""
        try:
            entries = self.fs.ls(self.join(folder) if folder else self.path, detail=True)
        except FileNotFoundError:
            return []
        return [entry for entry in entries if entry["type"] == "file"]

    def files(self, folder: str = "") -> list[str]:
        """Names of the files (not folders) directly in `folder`; none if it is not there."""
        return [entry["name"].rpartition("/")[2] for entry in self.ls(folder)]

    def entries(self, folder: str = "") -> list[str]:
        """Sorted names of files and folders directly in `folder`, unfinished ones left out; none
        if it is not there."""
        try:
            found = self.fs.ls(self.join(folder) if folder else self.path, detail=False)
        except FileNotFoundError:
            return []
        names = {path.rstrip("/").rpartition("/")[2] for path in found}
        return sorted(
            name for name in names if not (name.startswith(_UNFINISHED) or _STAGED.search(name))
        )

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        return bool(self.fs.exists(self.join(name)))

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

    @contextlib.contextmanager
    def asked_if_slow(self) -> Iterator[None]:
        """A block of a library that repeats its requests without a word: when it takes long, the
        place is asked once more, in the way that says so if it is away."""
        if self.is_local:
            yield
            return
        asking = threading.Timer(_SLOW_S, self._ask)
        asking.daemon = True
        asking.start()
        try:
            yield
        finally:
            asking.cancel()

    def _ask(self) -> None:
        with storage_failures_ignored():  # The block raises its own.
            self.entries()

    def read_bytes(self, name: str) -> bytes:
        """Content of a file.

        Raises: FileNotFoundError.
        """
        content: bytes = self.fs.cat_file(self.join(name))
        return content

    def tail(self, name: str, n_bytes: int) -> bytes:
        """The last bytes of a file, at most so many. Raises: FileNotFoundError."""
        size = int(self.fs.info(self.join(name))["size"])
        part: bytes = self.fs.cat_file(self.join(name), start=max(0, size - n_bytes), end=size)
        return part

    def read_from(self, name: str, start: int) -> bytes:
        """A file from a byte on; nothing where it ends before. Raises: FileNotFoundError."""
        size = int(self.fs.info(self.join(name))["size"])
        if start >= size:  # Of an object a server would refuse the range.
            return b""
        part: bytes = self.fs.cat_file(self.join(name), start=start, end=size)
        return part

    def open(self, name: str) -> IO[bytes]:
        """A file to read parts of. Raises: FileNotFoundError."""
        if self.is_local:
            return open(self.join(name), "rb")
        file: IO[bytes] = self.fs.open(self.join(name), "rb", block_size=_BLOCK_BYTES)
        return file

    def fetched(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """See `fetched`."""
        return fetched(self.uri_of(name))

    @contextlib.contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """A path of this machine to write a file to; it is at `name` once the block ended well."""
        folder, _, base = self.join(name).rpartition("/")
        if not self.is_local:
            with scratch_folder() as scratch:
                yield Path(scratch) / base
                self.publish(f"{scratch}/{base}", name)
            return
        os.makedirs(folder, exist_ok=True)
        # The ending stays: what writes pictures goes by it.
        unfinished = Path(folder) / f"{_UNFINISHED}{uuid.uuid4().hex}.{base}"
        try:
            with told_if_full(self.join(name)):
                yield unfinished
                self.publish(str(unfinished), name)
        finally:
            unfinished.unlink(missing_ok=True)

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        """Create or replace a file."""
        if self.is_local:
            scratch = self.join(f"{name}.{uuid.uuid4().hex}.tmp")
            os.makedirs(os.path.dirname(scratch), exist_ok=True)
            try:
                with told_if_full(self.join(name)), open(scratch, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(scratch, self.join(name))
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(scratch)
                raise
        else:
            self.fs.pipe_file(self.join(name), bytes(data))

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Create a file unless it exists. Returns whether this call created it (atomic).

        Args: data: what no other caller writes.
        """
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
            # Ours, if only the answer was lost and the request came a second time.
            return self.read_bytes(name) == data
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

    def remove_tree(self, name: str) -> None:
        """Delete a file or folder; nothing happens if it is not there, or goes meanwhile.

        Raises: OSError, or what the library of an object store does, where something stays.
        """
        path = self.join(name)
        if not self.is_local:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, onerror=_unless_gone)
        else:
            Path(path).unlink(missing_ok=True)

    def publish(self, local_file: str, name: str) -> None:
        """Move a finished local file to `name`."""
        if self.is_local:
            with open(local_file, "rb") as file:
                os.fsync(file.fileno())
            os.replace(local_file, self.join(name))
        else:
            self.fs.put_file(local_file, self.join(name))
            os.unlink(local_file)


def _unless_gone(_function: Any, _path: str, raised: Any) -> None:
    error = raised[1]
    if not isinstance(error, FileNotFoundError):
        raise error


@contextlib.contextmanager
def fetched(uri: str | os.PathLike[str]) -> Iterator[Path]:
    """A file or folder at a URI as a path of this machine: itself, or a copy for as long as the
    block lasts. Nothing large goes through memory. Raises: FileNotFoundError."""
    place = Location(uri)
    if place.is_local:
        if not os.path.exists(place.path):
            raise FileNotFoundError(f"{place.path}: no such file or folder")
        yield Path(place.path)
        return
    with scratch_folder() as scratch:
        target = Path(scratch) / place.name
        with told_if_full(scratch):
            if place.fs.isdir(place.path):
                place.fs.get(f"{place.path}/", f"{target}/", recursive=True)
            else:
                place.fs.get_file(place.path, str(target))
        yield target


def place_of(uri: str | os.PathLike[str]) -> tuple[Location, str]:
    """The folder that a file lies in, and the file's name."""
    whole = Location(uri)
    folder = whole.path.rpartition("/")[0] if whole.is_local else whole.uri.rpartition("/")[0]
    return Location(folder or "/"), whole.name


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
    options = dict(DELTA_RETRIES)
    if emulator:
        nobody = {"client_email": "", "private_key": "", "private_key_id": ""}
        account = {"gcs_base_url": emulator, "disable_oauth": True, **nobody}
        options["google_service_account_key"] = json.dumps(account)
    if emulator or os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["allow_http"] = "true"
    return options
