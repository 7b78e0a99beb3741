"""ShardWriter and read_rows: feature shards, each one immutable Parquet file of about 256 clips.

Knows nothing of the clips table or of decoding. Invariant: a shard appears in `features/` whole or
not at all, and is never changed.
"""

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import FeatureSpec
from pipeline.errors import DamagedShard, StoreError
from pipeline.storage import Location, is_storage_failure
from pipeline.store.schema import ROW_GROUP_ROWS, SHARD_SCHEMA, SPEC_KEY

# Frames are JPEG: compressing them again gains 3 % at best.
_COMPRESSION = {
    name: "ZSTD" for name in SHARD_SCHEMA.names if name not in ("frames", "frame_ts_ms")
} | {"frames.list.element": "NONE", "frame_ts_ms.list.element": "ZSTD"}

_UNFINISHED = ".part-"

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
            handle, self._scratch = tempfile.mkstemp(prefix=_UNFINISHED, suffix=".tmp")
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
        self._writer.close()
        self._location.publish(self._scratch, self.name)

    def discard(self) -> None:
        """Give up and delete what was written; nothing happens after `publish`."""
        try:
            self._writer.close()  # Writes a footer, for which a full disk has no room.
        finally:
            Path(self._scratch).unlink(missing_ok=True)

    def _flush(self) -> None:
        self._writer.write_table(
            pa.Table.from_pylist(self._rows, SHARD_SCHEMA), row_group_size=ROW_GROUP_ROWS
        )
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


def by_shard(rows: pa.Table, most: int | None = ROW_GROUP_ROWS) -> Iterator[tuple[str, pa.Table]]:
    """Pieces of `Snapshot.rows`, in its order: a shard, and at most so many rows of it (None: all).

    Args: rows: those of a shard beside each other. One pass: a search for the rows of each shard
        took seconds at 200,000 clips.
    """
    rows = rows.combine_chunks()
    shards = rows["shard"].to_numpy()
    step = most or max(1, len(rows))
    ends = np.flatnonzero(shards[1:] != shards[:-1]) + 1
    for begin, end in pairwise([0, *ends.tolist(), len(rows)]):
        for at in range(begin, end, step):
            yield shards[at], rows.slice(at, min(step, end - at))


def read_rows(store_uri: str, shard: str, rows: np.ndarray | None, columns: list[str]) -> pa.Table:
    """Rows of one shard, reading only the row groups and columns needed.

    Args: shard: as in the clips table; rows: positions in the order wanted, None for all.
    Raises: DamagedShard if the shard is missing, no whole file, or has fewer rows; StoreError if
        the storage refuses, which says nothing of the shard.
    """
    return _read(store_uri, shard, lambda parquet, path: _take(parquet, rows, columns, path))


def shard_spec_hash(store_uri: str, shard: str) -> str:
    """Hash of the spec a shard was written with. Raises: as read_rows."""
    metadata = _read(store_uri, shard, lambda parquet, _: parquet.schema_arrow.metadata or {})
    return FeatureSpec.hash_of(metadata.get(SPEC_KEY, b""))


def _read(store_uri: str, shard: str, use: Callable[[pq.ParquetFile, str], T]) -> T:
    location = _location(store_uri)
    path = location.join(shard)
    watched: _Watched | None = None
    try:
        with location.fs.open(path, "rb") as file:
            watched = _Watched(file)
            return use(pq.ParquetFile(pa.PythonFile(watched, mode="r")), path)
    except FileNotFoundError as error:
        raise DamagedShard(
            f"{path}: the clips table points at this shard and it is not there. A vacuum takes "
            f'those of old versions that nobody pins ("diccae store status --store {store_uri} '
            '--version N" says so); else the store was changed outside diccae: run "diccae store '
            f'verify --store {store_uri} --repair".'
        ) from error
    except StoreError:
        raise
    except Exception as error:
        read_whole = watched is not None and watched.failure is None
        if read_whole and isinstance(error, pa.ArrowException | OSError):
            raise DamagedShard(
                f"{path}: not a whole Parquet file ({error}). Run "
                f'"diccae store verify --store {store_uri} --repair", then ingest again.'
            ) from error
        if not is_storage_failure(error):
            raise
        raise StoreError(
            f"{path}: the storage does not give it ({type(error).__name__}: {error}). Nothing is "
            "known to be wrong with the store. Look at permissions, keys and mounts, then run the "
            "same again."
        ) from error


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
