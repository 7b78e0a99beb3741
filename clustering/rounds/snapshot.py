"""Frozen bank rows as Parquet: what a round is made of, and what a restart reads again.

Knows nothing of Ray or k-means. Invariant: a part file holds whole virtual shards, one row group
each, rows sorted by key; which actor wrote it changes nothing that is read.

The row is a fixed-size binary of {dtype, dim} (file metadata): ten times as fast to write as a
list of floats.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clustering import storage
from clustering.errors import ClusteringError
from clustering.kmeans.hashing import vshard_of
from clustering.kmeans.share import Block
from clustering.kmeans.views import stream_slices
from clustering.rounds.bank import BankRows


@dataclass(frozen=True)
class Part:
    """One file of a snapshot."""

    uri: str
    vshards: tuple[int, ...]
    """Virtual shard of each row group."""
    rows: tuple[int, ...]
    """Rows of each row group."""
    step_sum: int
    """Sum of the rows' steps."""
    step_min: int
    """Smallest step; 0 without rows."""


def write_part(uri: str, rows: BankRows, streams: Mapping[str, int], vshards: int) -> Part:
    """Write rows, sorted by virtual shard and key, as one file."""
    width = sum(streams.values())
    vshard = vshard_of(rows.keys, vshards)
    order = np.lexsort((rows.keys, vshard))
    present, starts = np.unique(vshard[order], return_index=True)
    stops = np.append(starts, len(order))[1:].astype(np.int64)
    metadata = {"dtype": "float16", "dim": str(width), "streams": json.dumps(dict(streams))}
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
    return Part(
        uri,
        tuple(present.tolist()),
        tuple((stops - starts).tolist()),
        int(rows.steps.sum()),
        int(rows.steps.min()) if len(rows.steps) else 0,
    )


def read_rows(uri: str, width: int, row_groups: list[int] | None = None) -> Iterator[BankRows]:
    """Yield the row groups of a part file.

    Raises: ClusteringError by way of pyarrow if the file is damaged; ValueError for another width.
    """
    with fsspec.open(uri, "rb") as handle, pq.ParquetFile(handle) as file:
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


def saved_rows(uri: str, streams: Mapping[str, int]) -> BankRows:
    """All rows that `Rounds.save` wrote under `uri`, of them the slices named in `streams`.

    Raises: ClusteringError if there are no rows, or rows without such a slice.
    """
    files = [name for name in storage.names(uri) if name.startswith("bank-")]
    if not files:
        raise ClusteringError(
            f"{uri}: no saved bank (bank-*.parquet). Restore from a checkpoint that was saved."
        )
    groups = [rows for name in files for rows in _slices(storage.join(uri, name), streams)]
    return BankRows.concat([BankRows.empty(sum(streams.values())), *groups])


def _slices(uri: str, streams: Mapping[str, int]) -> Iterator[BankRows]:
    with fsspec.open(uri, "rb") as handle:
        saved = json.loads(pq.read_schema(handle).metadata[b"streams"])
    if any(saved.get(name) != width for name, width in streams.items()):
        raise ClusteringError(
            f"{uri}: saved rows hold {saved}, the bank {dict(streams)}. Restore from a checkpoint "
            "of a run with these streams."
        )
    slices = stream_slices(saved)
    columns = np.concatenate([np.arange(*slices[name]) for name in streams])
    for rows in read_rows(uri, sum(saved.values())):
        yield rows if list(saved) == list(streams) else rows._replace(rows=rows.rows[:, columns])


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
class Snapshot:
    """All frozen rows of a round."""

    uri: str
    parts: tuple[Part, ...]
    width: int

    @property
    def n_rows(self) -> int:
        """Frozen rows."""
        return sum(sum(part.rows) for part in self.parts)

    @property
    def step_sum(self) -> int:
        """Sum of their steps."""
        return sum(part.step_sum for part in self.parts)

    def write_manifest(self) -> None:
        """Commit: from here on the snapshot exists."""
        parts = [
            {
                "file": part.uri.rsplit("/", 1)[-1],
                "vshards": part.vshards,
                "rows": part.rows,
                "step_sum": part.step_sum,
                "step_min": part.step_min,
            }
            for part in self.parts
        ]
        storage.write_json(
            storage.join(self.uri, "manifest.json"), {"width": self.width, "parts": parts}
        )

    @classmethod
    def load(cls, uri: str) -> "Snapshot | None":
        """The snapshot under `uri`, or None if it was never completed."""
        try:
            manifest = storage.read_json(storage.join(uri, "manifest.json"))
        except FileNotFoundError:
            return None
        parts = tuple(
            Part(
                storage.join(uri, part["file"]),
                tuple(part["vshards"]),
                tuple(part["rows"]),
                part["step_sum"],
                part["step_min"],
            )
            for part in manifest["parts"]
        )
        return cls(uri, parts, manifest["width"])

    def source(self, index: int = 0, count: int = 1) -> "SnapshotSource":
        """Share `index` of `count`: virtual shards go round robin."""
        chosen = []
        for part in self.parts:
            groups = [g for g, vshard in enumerate(part.vshards) if vshard % count == index]
            if groups:
                chosen.append((part.uri, tuple(groups)))
        return SnapshotSource(f"{self.uri}#{index}/{count}", tuple(chosen), self.width)


@dataclass(frozen=True)
class SnapshotSource:
    """One share of a snapshot, read from storage."""

    token: str
    chosen: tuple[tuple[str, tuple[int, ...]], ...]
    """File and its row groups."""
    width: int
    keep_rows: bool = True

    def blocks(self) -> Iterator[Block]:
        """One block per virtual shard."""
        for uri, groups in self.chosen:
            for rows in read_rows(uri, self.width, list(groups)):
                yield Block(rows.keys, rows.rows)
