"""FrozenRows: the bank rows a round is made of, as Parquet files that a restart reads again.

Knows nothing of Ray or k-means. Invariant: a file of rows holds whole virtual shards, one row group
each, rows sorted by key; which actor wrote it changes nothing that is read.

The row is a fixed-size binary of {dtype, dim} (file metadata): ten times as fast to write as a
list of floats.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clustering import storage
from clustering.errors import ClusteringError
from clustering.kmeans.hashing import vshard_of
from clustering.kmeans.share import RowBlock
from clustering.rounds.bank import BankRows


@dataclass(frozen=True)
class Owner:
    """Bank `index` of `count`: it owns every count-th of the virtual shards."""

    index: int
    count: int
    vshards: int

    def owns(self, vshard: np.ndarray) -> np.ndarray:
        """Whether virtual shards are this bank's."""
        return np.asarray(vshard % self.count == self.index)

    def groups_of(self, metadata: Mapping[bytes, bytes]) -> list[int] | None:
        """Row groups with this bank's rows; None, all, where a file does not say.

        A hundred banks that each read all rows would read the checkpoint a hundred times.
        """
        written = json.loads(metadata.get(b"vshards", b"{}"))
        if written.get("count") != self.vshards:
            return None
        return np.flatnonzero(self.owns(np.array(written["groups"], dtype=np.int64))).tolist()


@dataclass(frozen=True)
class RowFile:
    """One file of bank rows."""

    uri: str
    vshards: tuple[int, ...]
    """Virtual shard of each row group."""
    rows: tuple[int, ...]
    """Rows of each row group."""
    step_sum: int
    """Sum of the rows' steps."""


def write_rows(uri: str, rows: BankRows, streams: Mapping[str, int], vshards: int) -> RowFile:
    """Write rows, sorted by virtual shard and key, as one file."""
    width = sum(streams.values())
    vshard = vshard_of(rows.keys, vshards)
    order = np.lexsort((rows.keys, vshard))
    present, starts = np.unique(vshard[order], return_index=True)
    stops = np.append(starts, len(order))[1:].astype(np.int64)
    metadata = {
        "dtype": "float16",
        "dim": str(width),
        "streams": json.dumps(dict(streams)),
        "vshards": json.dumps({"count": vshards, "groups": present.tolist()}),
    }
    schema = pa.schema(
        [("key", pa.uint64()), ("step", pa.int64()), ("row", pa.binary(2 * width))], metadata
    )
    sink = pa.BufferOutputStream()
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for start, stop in zip(starts, stops, strict=True):
            group = rows.take(order[start:stop])
            table = pa.table([column(values) for values in group], schema=schema)
            writer.write_table(table, row_group_size=len(group.keys))
    storage.write_bytes(uri, memoryview(sink.getvalue()))
    return RowFile(
        uri, tuple(present.tolist()), tuple((stops - starts).tolist()), int(rows.steps.sum())
    )


def read_rows(uri: str, width: int, row_groups: list[int] | None = None) -> Iterator[BankRows]:
    """Yield the row groups of a file.

    Raises: ClusteringError by way of pyarrow if the file is damaged; ValueError for another width.
    """
    with storage.opened(uri) as handle, pq.ParquetFile(handle) as file:
        found = int(file.schema_arrow.metadata[b"dim"])
        if found != width:
            raise ValueError(f"{uri}: rows of {found} values, the bank holds rows of {width}")
        for group in range(file.num_row_groups) if row_groups is None else row_groups:
            table = file.read_row_group(group)
            keys, steps, row = (chunked.combine_chunks() for chunked in table.columns)
            payload = np.frombuffer(row.buffers()[1], dtype=np.float16)
            start = row.offset * width
            values = payload[start : start + len(row) * width].reshape(len(row), width)
            yield BankRows(keys.to_numpy(), steps.to_numpy(), values)


EVERYTHING = Owner(0, 1, 1)


def column(values: np.ndarray) -> pa.Array:
    """A numpy array as an Arrow column; [N, W] becomes N binaries of fixed size.

    From buffers, because pa.array() on numpy imports pandas: 0.3 s and 40 MB in every actor.
    """
    values = np.ascontiguousarray(values)
    if values.ndim == 2:
        kind = pa.binary(values.shape[1] * values.itemsize)
    else:
        kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


@dataclass(frozen=True)
class FrozenRows:
    """All rows of a round."""

    uri: str
    parts: tuple[RowFile, ...]
    width: int

    @property
    def n_rows(self) -> int:
        """Frozen rows."""
        return sum(sum(part.rows) for part in self.parts)

    @property
    def step_sum(self) -> int:
        """Sum of their steps."""
        return sum(part.step_sum for part in self.parts)

    @classmethod
    def commit(cls, uri: str, parts: tuple[RowFile, ...], width: int) -> "FrozenRows":
        """From here on a restart uses these rows instead of freezing again.

        Raises: ClusteringError without rows: a round of nothing would be gone on with for ever.
        """
        frozen = cls(uri, parts, width)
        if frozen.n_rows == 0:
            raise ClusteringError(
                f"{uri}: no rows to cluster, the feature bank is empty. Push features before the "
                "round is started; after a restart, push them again."
            )
        written = [
            {
                "file": part.uri.rsplit("/", 1)[-1],
                "vshards": part.vshards,
                "rows": part.rows,
                "step_sum": part.step_sum,
            }
            for part in parts
        ]
        storage.write_json(storage.join(uri, "manifest.json"), {"width": width, "parts": written})
        return frozen

    @classmethod
    def load(cls, uri: str) -> "FrozenRows | None":
        """The rows under `uri`, or None if they were never committed."""
        try:
            manifest = storage.read_json(storage.join(uri, "manifest.json"))
        except FileNotFoundError:
            return None
        parts = tuple(
            RowFile(
                storage.join(uri, part["file"]),
                tuple(part["vshards"]),
                tuple(part["rows"]),
                part["step_sum"],
            )
            for part in manifest["parts"]
        )
        return cls(uri, parts, manifest["width"])

    def source(self, index: int = 0, count: int = 1) -> "FrozenSource":
        """Share `index` of `count`: virtual shards go round robin."""
        chosen = []
        for part in self.parts:
            groups = [g for g, vshard in enumerate(part.vshards) if vshard % count == index]
            if groups:
                chosen.append((part.uri, tuple(groups)))
        return FrozenSource(f"{self.uri}#{index}/{count}", tuple(chosen), self.width)


@dataclass(frozen=True)
class FrozenSource:
    """One share of a round's rows, read from storage."""

    token: str
    chosen: tuple[tuple[str, tuple[int, ...]], ...]
    """File and its row groups."""
    width: int
    keep_rows: bool = True

    def blocks(self) -> Iterator[RowBlock]:
        """One block per virtual shard."""
        for uri, groups in self.chosen:
            for rows in read_rows(uri, self.width, list(groups)):
                yield RowBlock(rows.keys, rows.rows)
