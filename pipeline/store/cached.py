"""ShardCache: ranges of shards in a bucket, kept on this node's own disk once they were read.

Knows nothing of Parquet, nor of why something is read: a unit is a range of bytes that is kept
whole. Invariants: a unit lies under its name whole or not at all, and is what storage would give,
since a shard never changes; the units of all processes of a node, unfinished ones included, stay
within the limit, and leave free what others of the disk need; what the disk refuses is read from
storage, for as long as it refuses.

    <folder>/shards-<user>/<hash of the store's URI>/<shard>/<first byte>-<end>
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import socket
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import StoreError

_log = logging.getLogger(__name__)

SILENT_S = 600.0
"""A store that was not read for so long is nobody's, an unfinished unit that of a dead writer."""
_TOUCHED_EVERY_S = 60.0
_FULL_FOR_S = 60.0
"""How long a process does not ask again for room that there was not."""
_FAILED_FOR_S = 300.0
"""How long it leaves a folder alone that failed it: a disk that is broken may take long to say so
each time, and one that was full for a moment serves the other epochs."""
_FREE_PART = 20
"""Of a disk this part stays free: beyond 95 % Ray refuses to spill objects to it, for whoever
needs room."""
_SPARE_BYTES = 4 * 2**30
"""Free besides, but no more than that part again: for a checkpoint on its way and for units that
were claimed and are not written."""
_AT_A_TIME = 64
"""Room is made for this part of the limit together, since all units are looked at for it."""
_USED = "used"
_NAME = re.compile(r"(?:tail-)?(\d+)-(\d+)(\.\w+)?")
"""Of a unit; with an ending, of one that is not finished."""

_one_asks = threading.Lock()


class ShardCache(NamedTuple):
    """Where each node keeps units, and how much of them."""

    folder: str
    limit_bytes: int

    def check(self) -> str:
        """Make the folder, before a run starts.

        Returns: what to say of a disk that has less room than the limit; empty if it has more.
        Raises: StoreError if this node cannot keep anything in the folder.
        """
        folder = _Folder(self)
        try:
            folder.make()
            room_bytes = folder.room_bytes()
        except OSError as error:
            raise StoreError(
                f"scale.shard_cache = {self.folder}: node {socket.gethostname()} can keep nothing "
                f"there ({error.strerror or error}); name a folder of each node's own disk that "
                "its processes may make or write to, or None"
            ) from error
        if room_bytes >= self.limit_bytes:
            return ""
        return (
            f"scale.shard_cache = {self.folder}: the disk of node {socket.gethostname()} has room "
            f"for {room_bytes / 2**30:.1f} GiB of it, scale.shard_cache_gib is "
            f"{self.limit_bytes / 2**30:g}; what finds no room is read from storage each time"
        )

    def units(self, store_uri: str, shard: str) -> "Units | None":
        """Those of a shard; None while this node has no folder, of which one warning tells."""
        with _one_asks:  # Else each thread of a reader makes a folder of its own, and warns.
            folder = _folder(self)
            if not folder.is_ours():
                return None
        store = hashlib.sha256(store_uri.encode()).hexdigest()[:16]
        return Units(folder, store, shard.rpartition("/")[2])


class Units:
    """Units of one shard, for one reading of it."""

    def __init__(self, folder: "_Folder", store: str, shard: str) -> None:
        self._folder, self._at = folder, folder.root / store / shard
        self.given: set[Path] = set()
        """Those that were read from the disk."""
        folder.touch(store)

    def tail(self) -> tuple[int, bytes] | None:
        """The end of the shard: where it begins, and its bytes."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._at):
                if name.startswith("tail-") and (found := _range_of(name)):
                    start, end = found
                    content = self._read(self._at / name, end - start, 0, end - start)
                    return None if content is None else (start, content)
        return None

    def keep_tail(self, start: int, content: bytes) -> None:
        """Keep the end of the shard, which begins at `start`."""
        path = self._at / f"tail-{start}-{start + len(content)}"
        self._folder.keep(path, len(content), lambda: content)

    def part(self, unit: tuple[int, int], start: int, end: int) -> bytes | None:
        """Bytes from start to end, which lie in the unit; None if it is not there whole."""
        first, last = unit
        path = self._at / f"{first}-{last}"
        return self._read(path, last - first, start - first, end - start)

    def keep(self, unit: tuple[int, int], fetch: Callable[[], bytes]) -> bytes | None:
        """Fetch a unit and keep it. Returns: its bytes; None, and nothing is fetched, if there is
        no room for it."""
        first, last = unit
        return self._folder.keep(self._at / f"{first}-{last}", last - first, fetch)

    def drop_given(self) -> None:
        """Remove what was read from the disk."""
        for path in self.given:
            self._folder.drop(path)

    def _read(self, path: Path, n_bytes: int, offset: int, n_wanted: int) -> bytes | None:
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        content = b""
        with contextlib.suppress(OSError):
            if os.fstat(handle).st_size == n_bytes:
                content = os.pread(handle, n_wanted, offset)
        os.close(handle)
        if len(content) != n_wanted:
            self._folder.drop(path)
            return None
        self.given.add(path)
        return content


class _Folder:
    """What this process knows of the node's folder."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self.root = Path(cache.folder, f"shards-{os.geteuid()}")
        self._is_ours = self._warned = False
        self._is_to_make = True
        self._full_until = self._failed_until = 0.0
        self._telling = threading.Lock()
        self._touched: dict[str, float] = {}

    def make(self) -> None:
        """Raises: OSError if nothing can be kept in it, or others may write to it."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self.root.mkdir(mode=0o700, exist_ok=True)
        about = self.root.lstat()
        # Who may write here may plant features.
        self._is_ours = about.st_uid == os.geteuid() and not stat.S_IMODE(about.st_mode) & 0o022
        if not self._is_ours:
            raise OSError(errno.EPERM, f"others may write to {self.root}")
        tempfile.TemporaryFile(dir=self.root).close()
        self._is_to_make = False

    def is_ours(self) -> bool:
        """Whether there is a folder to look for units in, also one that takes no more."""
        if self._is_to_make and time.monotonic() >= self._failed_until:
            try:
                self.make()
            except OSError as error:
                self._leave_alone(error)
        return self._is_ours

    def touch(self, store: str) -> None:
        """Let other processes know that the store is read, now and then."""
        now = time.monotonic()
        if now - self._touched.get(store, -_TOUCHED_EVERY_S) >= _TOUCHED_EVERY_S:
            self._touched[store] = now
            with contextlib.suppress(OSError):
                os.utime(self.root / store)

    def keep(self, path: Path, n_bytes: int, fetch: Callable[[], bytes]) -> bytes | None:
        """Raises: what `fetch` raises."""
        unfinished = self._claim(path, n_bytes)
        if unfinished is None:
            return None
        kept = False
        try:
            content = fetch()
            kept = len(content) == n_bytes and self._publish(unfinished, path, content)
            return content
        finally:
            self._remove(unfinished, 0 if kept else n_bytes)

    def drop(self, path: Path) -> None:
        """Remove a unit, if it is there."""
        if found := _range_of(path.name):
            self._remove(path, found[1] - found[0])

    def _claim(self, path: Path, n_bytes: int) -> Path | None:
        """An empty file for a unit, of which the bytes count from now on; None: no room."""
        if time.monotonic() < max(self._full_until, self._failed_until):
            return None
        try:
            with self._counting() as counter:
                used = _read_count(counter)
                if used is None or used + n_bytes > self._cache.limit_bytes:
                    used = self._counted_anew()
                if (excess := n_bytes - self._room_beside(used)) > 0:
                    used -= self._make_room(excess, path.parent.parent)
                if n_bytes > self._room_beside(used):
                    self._full_until = time.monotonic() + _FULL_FOR_S
                    _write_count(counter, used)
                    return None
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
                unfinished.touch(mode=0o600)
                _write_count(counter, used + n_bytes)
                return unfinished
        except OSError as error:
            self._leave_alone(error)
            return None

    def _publish(self, unfinished: Path, path: Path, content: bytes) -> bool:
        """Returns: whether this call made the unit."""
        try:
            with open(unfinished, "wb") as file:
                file.write(content)
                file.flush()
                # A node that loses power would have a file of this length without these bytes.
                os.fsync(file.fileno())
            os.link(unfinished, path)
        except FileExistsError:
            return False  # Another process was first.
        except OSError as error:
            self._leave_alone(error)
            return False
        return True

    def _remove(self, path: Path, n_bytes: int) -> None:
        """Remove a file and count it no more. Args: n_bytes: 0: they stay, under another name."""
        try:
            path.unlink()
            if n_bytes:
                with self._counting() as counter:
                    _write_count(counter, max(0, (_read_count(counter) or 0) - n_bytes))
        except FileNotFoundError:
            return
        except OSError as error:
            self._leave_alone(error)

    def _leave_alone(self, error: OSError) -> None:
        """Keep nothing for a while, and say so the first time."""
        with self._telling:
            self._is_to_make = True
            self._failed_until = time.monotonic() + _FAILED_FOR_S
            if self._warned:
                return
            self._warned = True
        _log.warning(
            "scale.shard_cache = %s: %s; this process of node %s goes on with storage, keeps "
            "nothing more there, and tries again every %.0f minutes",
            self._cache.folder,
            error.strerror or error,
            socket.gethostname(),
            _FAILED_FOR_S / 60,
        )

    @contextlib.contextmanager
    def _counting(self) -> Iterator[int]:
        """The file with the number of bytes in use, for as long as no other process has it.

        The system lets go of it for a process that dies.
        """
        counter = os.open(self.root / _USED, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(counter, fcntl.LOCK_EX)
            yield counter
        finally:
            os.close(counter)

    def room_bytes(self) -> int:
        """What units can take in all, those that are there included: the limit, or what the disk
        has. Raises: OSError."""
        with self._counting():
            used = self._counted_anew()
        return used + self._room_beside(used)

    def _room_beside(self, used: int) -> int:
        """Bytes that may come to those in use; negative: so many are too much."""
        disk = os.statvfs(self.root)
        part = disk.f_blocks * disk.f_frsize // _FREE_PART
        on_disk = disk.f_bavail * disk.f_frsize - part - min(part, _SPARE_BYTES)
        return min(self._cache.limit_bytes - used, on_disk)

    def _counted_anew(self) -> int:
        """Bytes in use: what died was counted, too, and what somebody deleted."""
        used, now = 0, time.time()
        for store in _folders(self.root):
            for found in _found(store):
                if found.finished or now - found.modified < SILENT_S:
                    used += found.n_bytes
                else:
                    found.path.unlink(missing_ok=True)
        return used

    def _make_room(self, needed: int, mine: Path) -> int:
        """Remove units of stores that nobody reads, oldest first. Returns: bytes of them.

        None of the store that is read: of a set larger than the room, in an order that is another
        one in each epoch, what came first serves its share of every epoch, and what came last is
        gone before it is asked for again.
        """
        wanted, freed = max(needed, self._cache.limit_bytes // _AT_A_TIME), 0
        last_read = {store: store.stat().st_mtime for store in _folders(self.root)}
        for store in sorted(last_read, key=last_read.__getitem__):
            if store == mine or time.time() - last_read[store] < SILENT_S:
                continue
            for found in sorted(_found(store), key=lambda found: found.modified):
                if freed >= wanted:
                    return freed
                found.path.unlink(missing_ok=True)
                freed += found.n_bytes
            for folder in (*_folders(store), store):
                with contextlib.suppress(OSError):  # Somebody else's file lies in it.
                    folder.rmdir()
        return freed


class _Found(NamedTuple):
    """A file of the folder."""

    path: Path
    n_bytes: int
    """By its name: an unfinished one counts whole."""
    finished: bool
    modified: float
    """Unix, s."""


@lru_cache(maxsize=8)
def _folder(cache: ShardCache) -> _Folder:
    return _Folder(cache)


def _range_of(name: str) -> tuple[int, int] | None:
    """Which bytes of its shard a finished unit is."""
    match = _NAME.fullmatch(name)
    return None if match is None or match[3] else (int(match[1]), int(match[2]))


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]


def _found(store: Path) -> Iterator[_Found]:
    """The units of a store; any of them may be removed meanwhile."""
    for shard in _folders(store):
        with os.scandir(shard) as entries:
            for entry in entries:
                if match := _NAME.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        modified = entry.stat(follow_symlinks=False).st_mtime
                        n_bytes = int(match[2]) - int(match[1])
                        yield _Found(Path(entry.path), n_bytes, match[3] is None, modified)


def _read_count(counter: int) -> int | None:
    told = os.pread(counter, 32, 0).strip()
    return int(told) if told.isdigit() else None


def _write_count(counter: int, used: int) -> None:
    # Of one length, so that no shorter number leaves digits of a longer one behind.
    os.pwrite(counter, b"%31d\n" % used, 0)
