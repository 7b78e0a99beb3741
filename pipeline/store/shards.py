"""ShardWriter and read_rows: feature shards, each one immutable Parquet file of about 256 clips.

Knows nothing of the clips table or of decoding. Invariant: a shard appears in `features/` whole or
not at all, and is never changed.
"""

import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import FeatureSpec
from pipeline.errors import DamagedShard, StoreError
from pipeline.scratch import scratch_file, told_if_full
from pipeline.storage import Location, is_storage_failure
from pipeline.store.cached import ShardCache, Units
from pipeline.store.cached_file import CachedFile, Details
from pipeline.store.schema import ROW_GROUP_ROWS, SHARD_SCHEMA, SPEC_KEY

# Frames are JPEG: compressing them again gains 3 % at best.
_COMPRESSION = {
    name: "ZSTD" for name in SHARD_SCHEMA.names if name not in ("frames", "frame_ts_ms")
} | {"frames.list.element": "NONE", "frame_ts_ms.list.element": "ZSTD"}

_UNFINISHED = ".part-"
AT_ONCE = 8
"""Shards that a process asks for at once: as many as Arrow has threads for reading."""

T = TypeVar("T")


def discard_unfinished(location: Location, run_id: str | None = None) -> None:
    """Delete what writers that were killed left in a local store.

    Args: run_id: of this run alone; None: of all runs, only for who holds the store's lease.
    """
    prefix = _UNFINISHED if run_id is None else f"{_UNFINISHED}{run_id}-"
    for name in location.files("features") if location.is_local else []:
        if name.startswith(prefix):
            Path(location.join(f"features/{name}")).unlink(missing_ok=True)


class ShardWriter:
    """Writes rows to a temporary file, row group by row group; `publish` makes it a shard."""

    def __init__(self, location: Location, name: str, spec: FeatureSpec) -> None:
        """Args: name: `features/part-<run id>-....parquet`."""
        self._location, self.name = location, name
        if location.is_local:
            folder, base = os.path.split(location.join(name))
            os.makedirs(folder, exist_ok=True)
            # Not by mkstemp, whose files are its owner's alone: others of a shared store read them.
            # With the name of the shard, so that a run knows which are its own.
            self._scratch = f"{folder}/.{base}.{uuid.uuid4().hex}.tmp"
        else:
            handle, self._scratch = scratch_file()
            os.close(handle)
        self._writer = pq.ParquetWriter(
            self._scratch,
            SHARD_SCHEMA.with_metadata({SPEC_KEY: spec.canonical_json().encode()}),
            compression=_COMPRESSION,
            compression_level={"fbank": 1},
            use_dictionary=["label", "split", "codec", "decoder"],
            write_statistics=["clip_id"],
        )
        self._rows: list[dict[str, Any]] = []
        self.n_rows = 0

    def add(self, row: dict[str, Any]) -> int:
        """Append a row. Returns its position in the shard."""
        self._rows.append(row)
        self.n_rows += 1
        if len(self._rows) == ROW_GROUP_ROWS:
            self._flush()
        return self.n_rows - 1

    def publish(self) -> None:
        """Finish the file and make it visible under its name."""
        if self._rows:
            self._flush()
        with told_if_full(os.path.dirname(self._scratch)):
            self._writer.close()
        self._location.publish(self._scratch, self.name)

    def discard(self) -> None:
        """Give up and delete what was written; nothing happens after `publish`."""
        try:
            with told_if_full(os.path.dirname(self._scratch)):
                self._writer.close()  # Writes a footer, for which a full disk has no room.
        finally:
            Path(self._scratch).unlink(missing_ok=True)

    def _flush(self) -> None:
        table = pa.Table.from_pylist(self._rows, SHARD_SCHEMA)
        with told_if_full(os.path.dirname(self._scratch)):
            self._writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        self._rows = []


class _Watched:
    """A file that remembers whether storage failed it: Arrow tells a damaged page and a disk that
    does not answer apart in the wording only."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.closed = False
        self.failure: BaseException | None = None

    def _tried(self, call: Callable[..., T], *args: int) -> T:
        try:
            return call(*args)
        except BaseException as error:
            self.failure = error
            raise

    def read(self, n_bytes: int = -1) -> bytes:
        return self._tried(self._file.read, n_bytes)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._tried(self._file.seek, offset, whence)

    def tell(self) -> int:
        return self._tried(self._file.tell)


def by_shard(rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """`Snapshot.rows` shard by shard, in its order.

    Args: rows: those of a shard beside each other. One pass: a search for the rows of each shard
        took seconds at 200,000 clips.
    """
    rows = rows.combine_chunks()
    for begin, end in _runs(rows["shard"].to_numpy()):
        yield rows["shard"][begin].as_py(), rows.slice(begin, end - begin)


def by_row_group(rows_n: np.ndarray) -> list[slice]:
    """Which of these rows of a shard, in ascending order, lie in one row group."""
    return [slice(begin, end) for begin, end in _runs(rows_n // ROW_GROUP_ROWS)]


def _runs(values_n: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of equal values; none of no values."""
    ends = (np.flatnonzero(values_n[1:] != values_n[:-1]) + 1).tolist()
    return pairwise([0, *ends, len(values_n)] if len(values_n) else [])


def with_features(
    store_uri: str, rows: pa.Table, columns: list[str]
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """`Snapshot.rows` and what the shards hold of them, a row group at a time.

    Raises: as read_rows.
    """
    for shard, mine in by_shard(rows):
        places_n = mine["row"].to_numpy()
        pieces = by_row_group(places_n)
        tables = read_pieces(store_uri, shard, [places_n[piece] for piece in pieces], columns)
        for piece, table in zip(pieces, tables, strict=True):
            yield mine.slice(piece.start, piece.stop - piece.start), table


def read_rows(
    store_uri: str,
    shard: str,
    rows: np.ndarray | None,
    columns: list[str],
    *,
    keeps_footer: bool = False,
    cache: ShardCache | None = None,
) -> pa.Table:
    """Rows of one shard, reading only the row groups and columns needed.

    Args: shard: as in the clips table; rows: positions in the order wanted, None for all;
        keeps_footer: the shard will be read again, and that its file has not changed since is not
        in question: where a request costs, two of the next reading are spared; cache: where this
        node keeps row groups, so that it asks a bucket once.
    Returns: the columns; the schema has the metadata of the shard (`spec_hash_of`).
    Raises: DamagedShard if the shard is missing, no whole file, or has fewer rows; StoreError if
        the storage refuses, which says nothing of it.
    """
    (table,) = _read(
        store_uri,
        shard,
        lambda parquet, path: iter([_take(parquet, rows, columns, path)]),
        keeps_footer=keeps_footer,
        cache=cache,
    )
    return table


def read_pieces(
    store_uri: str, shard: str, pieces: list[np.ndarray], columns: list[str]
) -> Iterator[pa.Table]:
    """The same for several lots of rows one after the other, of a file that is opened once."""
    return _read(
        store_uri,
        shard,
        lambda parquet, path: (_take(parquet, rows, columns, path) for rows in pieces),
    )


def shard_n_rows(store_uri: str, shard: str) -> int:
    """Rows of a shard, of which the footer alone is read. Raises: as read_rows."""
    n_rows: int
    (n_rows,) = _read(store_uri, shard, lambda parquet, _: iter([parquet.metadata.num_rows]))
    return n_rows


def spec_hash_of(table: pa.Table) -> str:
    """Hash of the spec that the shard was written with which `read_rows` took this from."""
    return FeatureSpec.hash_of((table.schema.metadata or {}).get(SPEC_KEY, b""))


class _Footer(NamedTuple):
    """What has to be known of a shard before its columns can be asked for."""

    details: Details
    metadata: pq.FileMetaData


class _Footers:
    """Footers of the shards read last in this process, by path; any thread may ask."""

    def __init__(self, most: int) -> None:
        self._most, self._kept, self._lock = most, OrderedDict[str, _Footer](), Lock()

    def get(self, path: str) -> _Footer | None:
        with self._lock:
            if path in self._kept:
                self._kept.move_to_end(path)
            return self._kept.get(path)

    def forget(self, path: str) -> None:
        with self._lock:
            self._kept.pop(path, None)

    def keep(self, path: str, footer: _Footer) -> None:
        with self._lock:
            self._kept[path] = footer
            self._kept.move_to_end(path)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)


_footers = _Footers(most=512)


def _read(
    store_uri: str,
    shard: str,
    use: Callable[[pq.ParquetFile, str], Iterator[T]],
    *,
    keeps_footer: bool = False,
    cache: ShardCache | None = None,
) -> Iterator[T]:
    """What `use` yields of an open shard; an error of whoever takes it is none of the shard."""
    location = _location(store_uri)
    path = location.join(shard)
    if location.is_local:
        keeps_footer, cache = False, None  # There nothing would be spared.
    known = _footers.get(path) if keeps_footer else None
    units = cache and cache.units(location.uri, shard)
    watched: _Watched | None = None
    try:
        with _opened(location, path, known and known.details, units) as file:
            watched = _Watched(file)
            parquet = pq.ParquetFile(
                pa.PythonFile(watched, mode="r"), metadata=known and known.metadata, pre_buffer=True
            )
            details = getattr(file, "details", None)  # Files of some storages have none.
            if keeps_footer and details:
                _footers.keep(path, _Footer(details, parquet.metadata))
            if units is not None:
                file.rows = list(_row_groups(parquet.metadata))
            yield from use(parquet, path)
    except StoreError:
        raise
    except Exception as error:
        read_whole = watched is not None and watched.failure is None
        if _had_kept(path, known, units, read_whole):
            yield from _read(store_uri, shard, use)
            return
        told = _told(error, path, store_uri, read_whole)
        if told is None:
            raise
        raise told from error


def _had_kept(path: str, known: _Footer | None, units: Units | None, read_whole: bool) -> bool:
    """Forget what was kept of a shard that cannot be read: it may be what is broken, and of a file
    that was cut off a range is refused, as by storage that fails. Returns: whether any was."""
    _footers.forget(path)
    if units is not None and read_whole:
        units.drop_given()
    return known is not None or bool(units and units.given)


def _told(error: Exception, path: str, store_uri: str, read_whole: bool) -> StoreError | None:
    """What to say in place of an error; None: it is none of a shard or of storage.

    Args: read_whole: the storage gave whatever was asked for.
    """
    if isinstance(error, FileNotFoundError):
        return DamagedShard(
            f"{path}: the clips table points at this shard and it is not there. A vacuum takes "
            f'those of old versions that nobody pins ("diccae store status --store {store_uri} '
            '--version N" says so); else the store was changed outside diccae: run "diccae store '
            f'verify --store {store_uri} --repair".'
        )
    if read_whole and isinstance(error, pa.ArrowException | OSError):
        return DamagedShard(
            f"{path}: not a whole Parquet file ({error}). Run "
            f'"diccae store verify --store {store_uri} --repair", then ingest again.'
        )
    if not is_storage_failure(error):
        return None
    return StoreError(
        f"{path}: the storage does not give it ({type(error).__name__}: {error}). Nothing is "
        "known to be wrong with the store. Look at permissions, keys and mounts, then run the "
        "same again."
    )


def _opened(
    location: Location, path: str, details: Details | None, units: Units | None = None
) -> Any:
    """The file to read ranges of, each asked for as it is: Arrow asks for the columns of a row
    group together (`pre_buffer`), and fsspec's default would add 5 to 50 MB to each of them."""
    if units is not None:
        return CachedFile(units, partial(_opened, location, path), details)
    # What is not given is asked for.
    file = location.fs.open(path, "rb", cache_type="none", size=details and details["size"])
    if details is not None:
        file.details = details
    return file


def _row_groups(metadata: pq.FileMetaData) -> Iterator[tuple[int, int]]:
    """First byte and end of each, whose columns lie one after the other."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        ends = group.column(0), group.column(group.num_columns - 1)
        first, last = (each.dictionary_page_offset or each.data_page_offset for each in ends)
        yield first, last + ends[1].total_compressed_size


def _take(
    parquet: pq.ParquetFile, rows: np.ndarray | None, columns: list[str], path: str
) -> pa.Table:
    if rows is None:
        return parquet.read(columns, use_threads=False)
    rows = np.asarray(rows, np.int64)
    meta = parquet.metadata
    if len(rows) and rows.max() >= meta.num_rows:
        raise DamagedShard(
            f"{path}: {meta.num_rows} rows, the clips table points at row {rows.max()}. The store "
            "was changed outside diccae; run store verify --repair, then ingest again."
        )
    starts = np.cumsum([0] + [meta.row_group(i).num_rows for i in range(meta.num_row_groups)])
    group_of_row = np.searchsorted(starts, rows, side="right") - 1
    groups = np.unique(group_of_row)
    table = parquet.read_row_groups(groups.tolist(), columns, use_threads=False)
    kept = np.concatenate([[0], np.cumsum(np.diff(starts)[groups])])
    return table.take(rows - starts[group_of_row] + kept[np.searchsorted(groups, group_of_row)])


@lru_cache(maxsize=8)
def _location(store_uri: str) -> Location:
    return Location(store_uri)
