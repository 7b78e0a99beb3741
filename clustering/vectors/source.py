"""VectorSource: the vectors of any Parquet files as blocks of rows.

Knows nothing of k-means or Ray. Invariant: a block is a fixed range of rows of one row group, so
blocks are the same whoever reads them; the key of a row is its number over all files in the order
of their names.

A vector is a list or fixed-size list of numbers, or a fixed-size binary with metadata
{"dtype": "float16", "dim": "512"} on the field or the schema.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clustering import storage
from clustering.errors import BadVectors, ClusteringError
from clustering.kmeans.share import RowBlock
from pipeline.patience import open_filesystem

_BLOCK_ROWS = 16384


@dataclass(frozen=True)
class Piece:
    """Rows start..stop-1 of one row group; `first_key` is the key of row 0 of the group."""

    uri: str
    group: int
    start: int
    stop: int
    first_key: int


@dataclass(frozen=True)
class VectorFile:
    """What is known of a file from its footer."""

    uri: str
    group_rows: tuple[int, ...]
    columns: tuple[str, ...]

    @property
    def n_rows(self) -> int:
        """Rows of the file."""
        return sum(self.group_rows)


@dataclass(frozen=True)
class VectorSource:
    """The share of one actor."""

    token: str
    pieces: tuple[Piece, ...]
    column: str
    width: int
    keep_rows: bool = False

    def blocks(self) -> Iterator[RowBlock]:
        """Blocks of up to 16,384 rows. Raises: BadVectors for another width or missing rows."""
        for piece in self.pieces:
            for start, vectors in _read(piece, self.column, self.width):
                first = piece.first_key + start
                yield RowBlock(np.arange(first, first + len(vectors), dtype=np.uint64), vectors)


def find_files(uri: str) -> list[VectorFile]:
    """Parquet files at a file or folder URI, by name. Raises: ClusteringError if there are none."""
    filesystem, path = open_filesystem(uri)
    if not filesystem.exists(path):
        raise ClusteringError(f"{uri}: no such file or folder.")
    paths = sorted(filesystem.find(path)) if filesystem.isdir(path) else [path]
    if filesystem.isdir(path):
        paths = [p for p in paths if p.endswith(".parquet") and not _hidden(p[len(path) :])]
    if not paths:
        raise ClusteringError(f"{uri}: no *.parquet file in this folder.")
    return [_footer(filesystem.unstrip_protocol(p)) for p in paths]


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/") if part)


def _footer(uri: str) -> VectorFile:
    try:
        with storage.opened(uri) as handle, pq.ParquetFile(handle) as file:
            metadata = file.metadata
            rows = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
            return VectorFile(uri, rows, tuple(file.schema_arrow.names))
    except pa.ArrowInvalid as error:
        raise ClusteringError(f"{uri}: not a readable Parquet file: {error}") from None


def width_of(files: list[VectorFile], column: str) -> int:
    """Width of the first vector. Raises: BadVectors if there is none or no such column."""
    for file in files:
        if column not in file.columns:
            raise BadVectors(
                f"{file.uri}: no column {column!r}; it has {list(file.columns)}. "
                "Name the column that holds the vectors."
            )
    for file in files:
        for group, rows in enumerate(file.group_rows):
            if rows:
                piece = Piece(file.uri, group, 0, 1, 0)
                return int(next(_read(piece, column, None))[1].shape[1])
    raise BadVectors(f"{len(files)} files hold no rows: nothing to cluster.")


def shares_of(files: list[VectorFile], count: int) -> list[tuple[Piece, ...]]:
    """Pieces of `count` shares of nearly equal size, cut at block boundaries."""
    blocks = []
    key = 0
    for file in files:
        for group, rows in enumerate(file.group_rows):
            for start in range(0, rows, _BLOCK_ROWS):
                stop = min(start + _BLOCK_ROWS, rows)
                blocks.append(Piece(file.uri, group, start, stop, key))
            key += rows
    shares: list[list[Piece]] = [[] for _ in range(count)]
    done = 0
    for block in blocks:
        rows = block.stop - block.start
        share = shares[min(count - 1, (done + rows // 2) * count // max(key, 1))]
        last = share[-1] if share else None
        if last and (last.uri, last.group, last.stop) == (block.uri, block.group, block.start):
            share[-1] = Piece(last.uri, last.group, last.start, block.stop, last.first_key)
        else:
            share.append(block)
        done += rows
    return [tuple(share) for share in shares]


def _read(piece: Piece, column: str, width: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row in the group, float32 [n, D]) of whole blocks of a piece."""
    with storage.opened(piece.uri) as handle, pq.ParquetFile(handle) as file:
        field = file.schema_arrow.field(column)
        metadata = {**(file.schema_arrow.metadata or {}), **(field.metadata or {})}
        at = 0
        waiting: list[np.ndarray] = []
        batches = file.iter_batches(
            batch_size=_BLOCK_ROWS, row_groups=[piece.group], columns=[column], use_threads=False
        )
        for batch in batches:
            start, stop = max(at, piece.start), min(at + len(batch), piece.stop)
            if start < stop:
                where = f"{piece.uri}, row group {piece.group}, row {start}"
                chosen = batch.column(0).slice(start - at, stop - start)
                waiting.append(_to_float32(chosen, metadata, where, width))
            at += len(batch)
            if at >= piece.stop:
                break
    vectors = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
    for start in range(0, len(vectors), _BLOCK_ROWS):
        yield piece.start + start, vectors[start : start + _BLOCK_ROWS]


def _to_float32(
    values: pa.Array, metadata: dict[bytes, bytes], where: str, width: int | None
) -> np.ndarray:
    kind = values.type
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise BadVectors(f"{where} + {row}: the vector is null. Drop or repair this row.")
    if pa.types.is_fixed_size_binary(kind):
        vectors = _from_binary(values, metadata, where)
    elif pa.types.is_fixed_size_list(kind):
        vectors = _numbers(values.flatten(), where).reshape(len(values), kind.list_size)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = values.value_lengths().to_numpy(zero_copy_only=False)
        expected = int(lengths[0]) if width is None else width
        wrong = np.flatnonzero(lengths != expected)
        if len(wrong):
            raise BadVectors(
                f"{where} + {wrong[0]}: {lengths[wrong[0]]} values where {expected} are expected: "
                "all vectors must have one width."
            )
        vectors = _numbers(values.flatten(), where).reshape(len(values), expected)
    else:
        raise BadVectors(
            f"{where}: the column has type {kind}; expected a list or fixed-size list of numbers, "
            "or a fixed-size binary with metadata {dtype, dim}."
        )
    if width is not None and vectors.shape[1] != width:
        raise BadVectors(
            f"{where}: vectors of {vectors.shape[1]} values where {width} are expected: "
            "all vectors must have one width."
        )
    return vectors


def _numbers(values: pa.Array, where: str) -> np.ndarray:
    kind = values.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise BadVectors(f"{where}: vectors of {kind}; expected numbers.")
    if values.null_count:
        raise BadVectors(f"{where}: a vector has a null among its values. Repair this row.")
    with np.errstate(over="ignore"):  # an infinite value is reported with its row later
        return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float32)


def _from_binary(values: pa.Array, metadata: dict[bytes, bytes], where: str) -> np.ndarray:
    try:
        dtype, dim = np.dtype(metadata[b"dtype"].decode()), int(metadata[b"dim"])
    except (KeyError, TypeError, ValueError):
        raise BadVectors(
            f"{where}: a fixed-size binary needs metadata dtype and dim (say float16 and 512), "
            f"found {sorted(key.decode() for key in metadata)}."
        ) from None
    if dtype.kind not in "fiu" or dtype.itemsize * dim != values.type.byte_width:
        raise BadVectors(
            f"{where}: metadata says {dim} values of {dtype}, but a row has "
            f"{values.type.byte_width} bytes."
        )
    payload = np.frombuffer(values.buffers()[1], dtype=dtype)
    rows = payload[values.offset * dim : (values.offset + len(values)) * dim]
    with np.errstate(over="ignore"):
        return rows.reshape(len(values), dim).astype(np.float32)
