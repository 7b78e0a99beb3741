"""Files of a clustering by their URI: bytes, JSON and arrays, over `pipeline.storage`.

Knows nothing of what the files hold. Invariant: a file that can be seen is whole, as there. By URI
and not by place, since URIs are what manifests name and actors are given.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from pipeline.patience import open_filesystem
from pipeline.storage import Location, place_of

MayWrite = Callable[[], None]
"""Raises where another driver has taken the place over: called before each file of a pool, whose
actors may outlive the driver they belong to. Picklable."""


def always() -> None:
    """The `MayWrite` of a place that is the caller's alone."""


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts appended."""
    return "/".join([uri.rstrip("/"), *parts])


@contextlib.contextmanager
def opened(uri: str) -> Iterator[IO[bytes]]:
    """A file to read parts of. Raises: FileNotFoundError.

    With the blocks of MBs that fsspec reads, unlike `Location.open`: vectors are read row group by
    row group, and most of a file is wanted.
    """
    filesystem, path = open_filesystem(uri)
    with filesystem.open(path, "rb") as handle:
        yield handle


def write_bytes(uri: str, payload: bytes | memoryview) -> None:
    """Write a whole file, replacing an older one."""
    place, name = place_of(uri)
    place.write_bytes(name, payload)


def exists(uri: str) -> bool:
    """Whether there is a file or folder at `uri`."""
    place, name = place_of(uri)
    return place.exists(name)


def names(uri: str) -> list[str]:
    """Sorted names of what lies in a folder; empty if there is none. Staged files are left out."""
    return Location(uri).entries()


def remove(uri: str) -> None:
    """Remove a file or folder if it is there."""
    place, name = place_of(uri)
    place.remove_tree(name)


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file."""
    write_bytes(uri, json.dumps(value, indent=1, sort_keys=True).encode())


def read_json(uri: str) -> Any:
    """Read a JSON file. Raises: FileNotFoundError."""
    place, name = place_of(uri)
    return json.loads(place.read_bytes(name))


def write_arrays(uri: str, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as an uncompressed .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(uri, buffer.getbuffer())


def read_arrays(uri: str) -> dict[str, np.ndarray]:
    """Read a .npz file. Raises: FileNotFoundError."""
    place, name = place_of(uri)
    with np.load(io.BytesIO(place.read_bytes(name)), allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}
