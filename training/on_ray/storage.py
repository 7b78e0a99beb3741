"""arrow_filesystem: a run folder as Ray Train takes it, with our keys, patience and fence.

Knows nothing of what Ray writes. Invariant: once the run was taken over, Ray's own files (copies of
checkpoints, its list of them) are refused in an object store as ours are.

Why not pyarrow's own S3: it has another set of retries, time-outs and variables for the endpoint,
and knows no `gs://` emulator nor the other places of fsspec.
"""

from typing import Any

import pyarrow.fs

from pipeline.storage import Location
from training.attempt import Attempt


def arrow_filesystem(place: Location, attempt: Attempt) -> pyarrow.fs.FileSystem:
    """Where `place.path` is a path of."""
    if place.is_local:
        return pyarrow.fs.LocalFileSystem()
    return pyarrow.fs.PyFileSystem(_Handler(place, attempt))


class _Handler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]
    """Calls of pyarrow as calls of fsspec."""

    def __init__(self, place: Location, attempt: Attempt) -> None:
        super().__init__(place.fs)
        self._given = place, attempt

    def __reduce__(self) -> tuple[Any, ...]:
        return _Handler, self._given

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: there are none. s3fs would ask for the bucket, and make it where it may not
        look at it."""

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """Raises: RunTaken."""
        self._given[1].check()
        return super().open_output_stream(path, metadata)

    def delete_dir(self, path: str) -> None:
        """Raises: RunTaken."""
        self._given[1].check()
        super().delete_dir(path)
