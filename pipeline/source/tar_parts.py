"""Clips inside tar parts, as VGGSound is published: read as streams, never unpacked.

Knows nothing of decoding or of the clips table. Invariant: damage in a part costs the clips from
10 KB before it on (a part is read in such blocks) and no other; a part that did not change is read
through once to learn what is in it; whatever a part says, reading it takes little memory and disk.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cores import usable_cores
from pipeline.patience import open_filesystem
from pipeline.scratch import scratch_file, told_if_full
from pipeline.source.pace import Pace
from pipeline.storage import Location, is_refusal

PART_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SEPARATOR = "#"
"""Between the URI of a part and the name of a member."""

CONTROL = r"[\x00-\x1f\x7f]"
"""What would make a name several lines, or worse, in every list, message and table."""

_MOST_HEADER_BYTES = 1 << 20
"""Of all extended headers before a member. Names and attributes take a few KB; tarfile reads such a
header whole, and a .tar.gz of 3 MB can announce one of 1.3 GB."""
_MOST_HEADERS = 8
"""In a row: tarfile takes each by a call within the call."""

_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
_SCHEMA = pa.schema([("member", pa.string()), ("size", pa.int64())])
_DAMAGE_KEY = b"diccae.damage"
_NOT_UTF8_KEY = b"diccae.not_utf8"
"""Missing from what was written before there was one."""
_READER_KEY = b"diccae.reader"
_READER = b"2"
"""What a reader of another number took for damage is looked at again; one without a number stopped
behind the first of several compressed streams."""


@dataclass(frozen=True)
class PartIndex:
    """What can be read of a part."""

    members: list[str]
    sizes: list[int]
    damage: str
    """Why reading stopped early; empty if it did not."""
    not_utf8: list[str] = field(default_factory=list)
    """Readable forms of names that no table can hold; these are no members."""
    is_refused: bool = False
    """It is there and may not be read."""


class _Unbounded(tarfile.ReadError):
    """A header that announces more than is read; what stands before it is whole."""


class _Header(tarfile.TarInfo):
    """A member's header, of bounded size. `_proc_member` is tarfile's place for own rules."""

    def _proc_member(self, tar: "_BoundedTar") -> tarfile.TarInfo:
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise _Unbounded("a sparse member, which may announce any size")
        if self.type in _EXTENDED:
            tar.n_headers += 1
            tar.header_bytes += self.size
            if tar.n_headers > _MOST_HEADERS or tar.header_bytes > _MOST_HEADER_BYTES:
                raise _Unbounded(
                    f"{tar.n_headers} extended headers of {tar.header_bytes:,} bytes, more than "
                    f"the {_MOST_HEADERS} and {_MOST_HEADER_BYTES:,} that are read"
                )
        else:
            tar.n_headers = 0
            # Global headers stay in memory: together they are bounded too.
            tar.header_bytes = sum(len(k) + len(v) for k, v in tar.pax_headers.items())
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]

    def _proc_gnusparse_10(self, *args: object) -> None:
        raise _Unbounded("a sparse member, which may announce any size")


_EXTENDED = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


class _BoundedTar(tarfile.TarFile):
    """A tar that is read as a stream and may be hostile."""

    tarinfo = _Header
    n_headers = 0
    header_bytes = 0


_UNFOLD: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b\x08": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x5d\0\0\x80": lzma.LZMAFile,
}
"""By how a file begins, whatever its name says."""

_Take = Callable[[tarfile.TarFile, tarfile.TarInfo], str]


class _Unfolded:
    """The tar in a compressed part, of however many streams it is made: bgzip, pigz -i, pbzip2 and
    whoever appends make several, and tarfile itself stops behind the first."""

    def __init__(self, file: Any, unfold: Callable[[Any], Any]) -> None:
        self._file = file
        self._has_failed = False
        self._tar = unfold(SimpleNamespace(read=self._read_file))

    def _read_file(self, size: int = -1) -> bytes:
        try:
            block: bytes = self._file.read(size)
        except OSError:
            self._has_failed = True
            raise
        return block

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, those before damage without it. Raises: one of _DAMAGE; what the file
        raises."""
        try:
            block: bytes = self._tar.read1(size)
        except OSError as error:
            # bz2 says by it what the others have errors of their own for.
            if self._has_failed:
                raise
            raise tarfile.ReadError(f"invalid compressed data: {error}") from error
        return block


def _open_tar(file: Any) -> tarfile.TarFile:
    """A part as a stream. Raises: one of _DAMAGE."""
    head = file.read(max(map(len, _UNFOLD)))
    file.seek(0)
    unfold = next((way for magic, way in _UNFOLD.items() if head.startswith(magic)), None)
    stream: Any = _Unfolded(file, unfold) if unfold else file
    return _BoundedTar.open(fileobj=stream, mode="r|")


def part_of(uri: str) -> str | None:
    """The tar part a clip lies in, if it does."""
    # Folders above it and names of members hold the separator, too.
    end = uri.find(SEPARATOR)
    while end >= 0:
        if is_part(uri[:end]):
            return uri[:end]
        end = uri.find(SEPARATOR, end + 1)
    return None


def is_part(name: str) -> bool:
    """Whether a file name is that of a tar part."""
    return name.lower().endswith(PART_SUFFIXES)


def is_utf8(name: str) -> bool:
    """Whether a name, as a folder or part gives it, is one that a table can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(name: str) -> str:
    """A name for a message of one line."""
    if re.search(CONTROL, name):
        return repr(name)
    return os.fsencode(name).decode(errors="replace")


def index_parts(parts: list[tuple[str, str, int]], cache: Location | None) -> list[PartIndex]:
    """The members of parts given as (URI, fingerprint, bytes); remembered in `cache`/parts/.

    Parts are read by threads: decompression runs outside the interpreter's lock.
    """
    pace = Pace("listing the clips in tar parts", sum(size for _, _, size in parts))
    with ThreadPoolExecutor(min(len(parts), usable_cores()) or 1) as pool:
        indexes = [pool.submit(_index_part, *part, cache, pace) for part in parts]
        return [index.result() for index in indexes]


def _index_part(
    uri: str, fingerprint: str, n_bytes: int, cache: Location | None, pace: Pace
) -> PartIndex:
    key = hashlib.blake2b(f"{uri}\0{fingerprint}".encode(), digest_size=12).hexdigest()
    name = f"parts/{key}.parquet"
    if cache is not None and (kept := _kept_index(cache, name)) is not None:
        pace.known(n_bytes)
        return kept
    try:
        index = _read_index(uri, pace)
    except Exception as error:
        if not is_refusal(error):
            raise
        return PartIndex([], [], str(error), is_refused=True)
    if cache is not None:
        sink = pa.BufferOutputStream()
        about = {
            _DAMAGE_KEY: index.damage,
            _NOT_UTF8_KEY: json.dumps(index.not_utf8),
            _READER_KEY: _READER,
        }
        schema = _SCHEMA.with_metadata(about)
        pq.write_table(pa.table([index.members, index.sizes], schema=schema), sink)
        cache.write_bytes(name, sink.getvalue().to_pybytes())
    return index


def _kept_index(cache: Location, name: str) -> PartIndex | None:
    """What was found before; None if that is to be looked at (again)."""
    if not cache.fs.exists(cache.join(name)):
        return None
    table = pq.read_table(pa.BufferReader(cache.read_bytes(name)))
    about = table.schema.metadata
    damage = about[_DAMAGE_KEY].decode()
    # A part that was read to its end is not read again: that may take hours.
    if damage and about.get(_READER_KEY) != _READER:
        return None
    return PartIndex(
        table["member"].to_pylist(),
        table["size"].to_pylist(),
        damage,
        json.loads(about.get(_NOT_UTF8_KEY, b"[]")),
    )


def _read_index(uri: str, pace: Pace) -> PartIndex:
    found: list[tuple[str, int]] = []
    damage = ""
    n_read = 0
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb") as file:
        try:
            with _open_tar(file) as tar:
                for member in tar:
                    pace.read(file.tell() - n_read)
                    n_read = file.tell()
                    if member.isfile():
                        found.append((member.name, member.size))
        except _Unbounded as error:
            after = readable(found[-1][0]) if found else "its start"
            damage = f"cannot be read behind {after}: {error}"
        except _DAMAGE as error:
            # The data of the last member are skipped only on the way to the next header.
            after = readable(found.pop()[0]) if found else "its start"
            damage = f"cannot be read from {after} on: {error}"
    named = [(name, size) for name, size in found if is_utf8(name)]
    return PartIndex(
        [name for name, _ in named],
        [size for _, size in named],
        damage,
        [readable(name) for name, _ in found if not is_utf8(name)],
    )


def stream_members(uri: str, wanted: set[str]) -> Iterator[tuple[str, str]]:
    """Members of a part as temporary files, in the order they stand in it: (name, local path).

    The caller deletes the files. What lies behind damage is not yielded.
    """
    return _each(uri, wanted, _extract)


def hash_members(uri: str, wanted: set[str]) -> Iterator[tuple[str, str]]:
    """Name and hex SHA-256 of members of a part, without those behind damage; by one pass."""
    return _each(uri, wanted, _digest)


def _each(uri: str, wanted: set[str], take: _Take) -> Iterator[tuple[str, str]]:
    """What is taken of members of a part, the first of each name, in the order they stand in it."""
    left = set(wanted)
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb") as file:
        try:
            with _open_tar(file) as tar:
                for member in tar:
                    if member.isfile() and member.name in left:
                        left.discard(member.name)
                        yield member.name, take(tar, member)
                    if not left:
                        return
        except _DAMAGE:
            return


def _digest(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    source: Any = tar.extractfile(member)
    return hashlib.file_digest(source, "sha256").hexdigest()


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    source: Any = tar.extractfile(member)
    handle, path = scratch_file(PurePosixPath(member.name).suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            while block := source.read(1 << 20):
                with told_if_full(os.path.dirname(path)):
                    file.write(block)
                    file.flush()
    except BaseException:
        os.unlink(path)
        raise
    return path
