"""CachedFile: a shard to read ranges of, from this node's units and, what they lack, from storage.

Knows nothing of Parquet, and nothing of where units lie. Invariant: the bytes are those of the
shard; where all of them are units, storage is asked for nothing.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from os import SEEK_CUR, SEEK_END, SEEK_SET
from types import TracebackType
from typing import Any, BinaryIO

from pipeline.store.cached import Units

_TAIL_BYTES = 2**17
"""Kept of the end of a shard: a footer of VGGSound's is 78 KB."""

Details = dict[str, Any]
"""Of a file, as the storage told: its size, and what says that it is the same file still."""


class CachedFile:
    """As much of a file as Arrow asks for."""

    def __init__(
        self, units: Units, open_far: Callable[[Details | None], BinaryIO], known: Details | None
    ) -> None:
        """Args: open_far: the file in storage, which is asked for its details if none are given;
        known: the details, of a file whose end has been read.

        Raises: what `open_far` and its file raise.
        """
        self._units, self._open_far = units, open_far
        self._far: BinaryIO | None = None
        self._position = 0
        self._tail_at, self._tail = 0, b""
        self.rows: Sequence[tuple[int, int]] = ()
        """First byte and end of each range to keep as a unit, in their order."""
        self.details = known or self._told_by_its_end()
        self._size = int(self.details["size"])

    def __enter__(self) -> "CachedFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._far is not None:
            self._far.close()

    def tell(self) -> int:
        """See `io`."""
        return self._position

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        """See `io`."""
        begin = {SEEK_SET: 0, SEEK_CUR: self._position, SEEK_END: self._size}[whence]
        self._position = begin + offset
        return self._position

    def read(self, n_bytes: int = -1) -> bytes:
        """See `io`. Raises: what storage raises."""
        end = self._size if n_bytes < 0 else min(self._position + n_bytes, self._size)
        parts = []
        while self._position < end and (part := self._next_part(end)):
            parts.append(part)
            self._position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _told_by_its_end(self) -> Details:
        """The details, of which a kept end says all that is needed."""
        if (found := self._units.tail()) is not None:
            self._tail_at, self._tail = found
            return {"size": self._tail_at + len(self._tail)}
        self._far = self._open_far(None)
        size = self._far.seek(0, SEEK_END)
        self._tail_at = max(0, size - _TAIL_BYTES)
        self._tail = self._from_storage(self._tail_at, size)
        self._units.keep_tail(self._tail_at, self._tail)
        return getattr(self._far, "details", None) or {"size": size}

    def _next_part(self, end: int) -> bytes:
        """What comes next, to `end` or to where another unit begins."""
        start = self._position
        if self._tail and start >= self._tail_at:
            return self._tail[start - self._tail_at : end - self._tail_at]
        number = bisect_right(self.rows, start, key=lambda unit: unit[0]) - 1
        if number < 0 or start >= self.rows[number][1]:
            return self._from_storage(start, end)
        unit = first, last = self.rows[number]
        end = min(end, last)
        if (part := self._units.part(unit, start, end)) is not None:
            return part
        whole = self._units.keep(unit, lambda: self._from_storage(first, last))
        if whole is None:
            return self._from_storage(start, end)
        return whole[start - first : end - first]

    def _from_storage(self, start: int, end: int) -> bytes:
        if self._far is None:
            self._far = self._open_far(self.details)
        self._far.seek(start)
        return self._far.read(end - start)
