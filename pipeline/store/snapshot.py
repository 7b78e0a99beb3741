"""Snapshot: one version of a store as a data set, read from its clips table.

Writes nothing and knows nothing of how versions come about. Invariant: what a version says never
changes: its clips, their features and the spec in force, which is a property committed with it.
"""

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pa_dataset
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipeline.config import FeatureSpec
from pipeline.errors import StoreError
from pipeline.storage import is_storage_failure
from pipeline.store.log import KEY_COLUMNS, LogKeys
from pipeline.store.schema import CLIPS_SCHEMA, SPEC_PROPERTY, split_labels

if TYPE_CHECKING:
    from pipeline.store.store import FeatureStore

_ROW_COLUMNS = ["clip_id", "label", "more_labels", "split", "group", "shard", "row"]


class Snapshot:
    """One version of a store: what training reads, unchanged for ever."""

    def __init__(self, store: "FeatureStore", table: DeltaTable) -> None:
        self.uri = store.uri
        self.version: int = table.version()
        self._store = store
        self._table = table

    def states(self, columns: list[str], spec_hash: str | None = None) -> pa.Table:
        """The state of each clip under a spec (None: the one in force), in no particular order.

        A clip that has nothing under the spec comes with its newest row of another one. Removed
        clips are left out.

        Raises: StoreError if the version was vacuumed or the storage refuses.
        """
        if spec_hash is None and self.names_its_spec:
            spec_hash = self.spec_hash
        return self._rows_at(self._keys.states(spec_hash), columns)

    def kept_rows(self, specs: set[str] | None = None) -> pa.Table:
        """The log without what nobody can ask for: all CLIPS_SCHEMA columns.

        Args: specs: those that may be asked for, None for all. Raises: like states.
        """
        return self._rows_at(self._keys.kept(specs), CLIPS_SCHEMA.names)

    @property
    def has_superseded_rows(self) -> bool:
        """Whether `kept_rows` is shorter than the log."""
        return len(self._keys.kept(None)) < len(self._keys.seq_N)

    def shards(self, specs: set[str] | None = None) -> set[str]:
        """Shards that `kept_rows` points at: going back to a spec must find them.

        Args, raises: as kept_rows.
        """
        rows = self._rows_at(self._keys.kept(specs), ["shard"])
        return set(pc.unique(rows["shard"]).to_pylist()) - {None}

    @property
    def log_files(self) -> set[str]:
        """Names of the files below clips/ that this version is read from."""
        return {uri.rpartition("/")[2] for uri in self._table.file_uris()}

    @property
    def specs(self) -> set[str]:
        """Hashes of specs that the log has rows of."""
        return set(self._keys.specs)

    @cached_property
    def clips(self) -> pa.Table:
        """The clips table: one row per source clip (schema.CLIPS_SCHEMA)."""
        return self.states(CLIPS_SCHEMA.names)

    @cached_property
    def spec(self) -> FeatureSpec:
        """What the features of this version are: the spec in force."""
        return self._store.read_spec(self.spec_hash)

    @cached_property
    def names_its_spec(self) -> bool:
        """Whether the spec in force was committed; versions of format 1 leave it to be derived."""
        return SPEC_PROPERTY in self._table.metadata().configuration

    @cached_property
    def spec_hash(self) -> str:
        """Hash of `spec`; rows of another spec are not part of the data set."""
        if self.names_its_spec:
            return str(self._table.metadata().configuration[SPEC_PROPERTY])
        keys = self._keys
        if not len(keys.seq_N):
            return self._store.initial_spec_hash()
        return str(keys.specs[keys.spec_N[int(np.argmax(keys.seq_N))]])

    @cached_property
    def _live(self) -> pa.Table:
        columns = [*_ROW_COLUMNS, "row_key", "status", "spec_hash"]
        states = self.states(columns)
        ok = pc.and_(
            pc.equal(states["status"], "ok"), pc.equal(states["spec_hash"], self.spec_hash)
        )
        return states.filter(ok).sort_by([("shard", "ascending"), ("row", "ascending")])

    @cached_property
    def digest(self) -> str:
        """Equal for equal data: ids, contents (row_key), labels, splits; not for where they lie."""
        columns = ["clip_id", "row_key", "label", "split"]
        if self._live["more_labels"].null_count < len(self._live):
            columns.append("more_labels")
        rows = self._live.select(columns).sort_by("clip_id").combine_chunks()
        digest = hashlib.sha256()
        for name in columns:
            # Lengths and bytes: unlike a buffer, independent of offsets and chunking.
            joined = "\0".join(value or "" for value in rows[name].to_pylist())
            digest.update(joined.encode() + b"\0\0")
        return digest.hexdigest()

    def rows(self, split: str | None) -> pa.Table:
        """Live clips of a split (None: all) by (shard, row): clip_id, label, more_labels, split,
        group, shard, row."""
        live = self._live
        if split is not None:
            live = live.filter(pc.equal(live["split"], split))
        return live.select(_ROW_COLUMNS)

    @cached_property
    def classes(self) -> list[str]:
        """Distinct labels of live clips, sorted."""
        first, more = (
            pc.unique(self._live[name]).drop_null().to_pylist() for name in ("label", "more_labels")
        )
        return sorted({*first, *(label for joined in more for label in split_labels(joined))})

    @cached_property
    def _log(self) -> pa_dataset.Dataset:
        return self._table.to_pyarrow_dataset()

    @cached_property
    def _keys(self) -> LogKeys:
        try:
            with self._store.location.asked_if_slow():
                return LogKeys.read(self._log.to_batches(columns=KEY_COLUMNS))
        except Exception as error:
            raise self._unreadable(error) from error

    def _rows_at(self, positions: np.ndarray, columns: list[str]) -> pa.Table:
        """Rows of the log at sorted positions. Batch by batch: the log may be longer than memory,
        and no column of it may be put together (Arrow's strings end at 2 GiB)."""
        schema = pa.schema([CLIPS_SCHEMA.field(name) for name in columns])
        there = [name for name in columns if name in self._log.schema.names]
        parts = []
        begin = 0
        try:
            with self._store.location.asked_if_slow():
                # In order, and of the same data set as the keys: positions mean the same rows.
                for batch in self._log.to_batches(columns=there):
                    first, last = np.searchsorted(positions, (begin, begin + len(batch)))
                    if last > first:
                        parts.append(batch.take(pa.array(positions[first:last] - begin)))
                    begin += len(batch)
        except Exception as error:
            raise self._unreadable(error) from error
        if not parts:
            return schema.empty_table()
        rows = pa.Table.from_batches(parts)
        for name in schema.names:
            # A column that is younger than this version of the store: nobody filled it in.
            if name not in there:
                rows = rows.append_column(name, pa.nulls(len(rows), schema.field(name).type))
        rows = rows.select(columns)
        return rows if rows.schema.equals(schema) else rows.cast(schema)

    def _unreadable(self, error: Exception) -> Exception:
        """What to raise for an error while the log is read."""
        if not isinstance(error, DeltaError) and not is_storage_failure(error):
            return error
        return StoreError(
            f"{self.uri}: version {self.version} cannot be read ({error}). "
            "Versions are kept by pins and by the retention of store vacuum."
        )
