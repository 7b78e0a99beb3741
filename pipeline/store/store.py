"""A feature store: one URI with Parquet shards and the clips table that says which rows count.

Knows nothing of decoding or of Ray. Invariant: the clips table, a Delta table, is the truth and
the only commit point: a feature row exists if and only if a clips row of status ok points at it.
A version of the table pins a data set for ever.

The table is a log: a commit only appends, so that its cost depends on neither the clips already
there nor the commits before; the row with the highest `seq` is a clip's state.
"""

import hashlib
import json
import re
import uuid
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError

from pipeline.config import FeatureSpec
from pipeline.errors import StoreError
from pipeline.storage import Location, delta_options
from pipeline.store.identity import STORE_FILE
from pipeline.store.schema import CLIPS_SCHEMA, FORMAT
from pipeline.store.shards import read_rows

__all__ = ["FeatureStore", "Snapshot", "read_rows"]

_TABLE_KINDS = ("file", "s3", "s3a", "gs", "az", "abfs", "abfss", "hdfs")
_ROW_COLUMNS = ["clip_id", "label", "split", "group", "shard", "row"]
_CHECKPOINT_EVERY = 50
_FOLD_EVERY = 64
_FOLDED_BYTES = 32 << 20


class Snapshot:
    """One version of a store: what training reads, unchanged for ever."""

    def __init__(self, store: "FeatureStore", table: DeltaTable) -> None:
        self.uri = store.uri
        self.version: int = table.version()
        self._store = store
        self._table = table

    def states(self, columns: list[str]) -> pa.Table:
        """The newest row of each clip, tombstones left out, in no particular order."""
        needed = list(dict.fromkeys([*columns, "clip_id", "seq", "status"]))
        there = {field.name for field in self._table.schema().fields}
        log = self._table.to_pyarrow_table(columns=[name for name in needed if name in there])
        for name in needed:
            # A column that is younger than this version of the store: nobody filled it in.
            if name not in there:
                log = log.append_column(name, pa.nulls(len(log), CLIPS_SCHEMA.field(name).type))
        log = log.select(needed).cast(_subschema(needed))
        newest = log.take(_newest_rows(log))
        return newest.filter(pc.not_equal(newest["status"], "removed")).select(columns)

    @cached_property
    def clips(self) -> pa.Table:
        """The clips table: one row per source clip (schema.CLIPS_SCHEMA)."""
        return self.states(CLIPS_SCHEMA.names)

    @cached_property
    def spec(self) -> FeatureSpec:
        """What the features of this version are: the spec of its newest rows."""
        return self._store.read_spec(self.spec_hash)

    @cached_property
    def spec_hash(self) -> str:
        """Hash of `spec`; rows of another spec are not part of the data set."""
        log = self._table.to_pyarrow_table(columns=["seq", "spec_hash"])
        if not len(log):
            return self._store.initial_spec_hash()
        return log["spec_hash"][int(np.argmax(log["seq"].to_numpy()))].as_py()

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
        rows = self._live.select(columns).sort_by("clip_id").combine_chunks()
        digest = hashlib.sha256()
        for name in columns:
            # Lengths and bytes: unlike a buffer, independent of offsets and chunking.
            joined = "\0".join(value or "" for value in rows[name].to_pylist())
            digest.update(joined.encode() + b"\0\0")
        return digest.hexdigest()

    def rows(self, split: str | None) -> pa.Table:
        """Live clips of a split (None: all) by (shard, row): clip_id, label, split, group, shard,
        row."""
        live = self._live
        if split is not None:
            live = live.filter(pc.equal(live["split"], split))
        return live.select(_ROW_COLUMNS)

    @cached_property
    def classes(self) -> list[str]:
        """Distinct labels of live clips, sorted."""
        return sorted(label for label in pc.unique(self._live["label"]).to_pylist() if label)


class FeatureStore:
    """A store that exists. Make one with `create`, or `open` it."""

    def __init__(self, uri: str) -> None:
        self.location = Location(uri)
        self.uri = self.location.uri
        self._options = delta_options()
        self._table: DeltaTable | None = None
        self._n_appended = 0

    @classmethod
    def open(cls, uri: str) -> "FeatureStore":
        """The store at `uri`.

        Raises: StoreError if there is none, or one of another format.
        """
        store = cls(uri)
        try:
            about = json.loads(store.location.read_bytes(STORE_FILE))
        except FileNotFoundError:
            raise StoreError(
                f"{uri}: no feature store here ({STORE_FILE} is missing). Make one with "
                '"diccae ingest --clips CSV --videos DIR --store URI".'
            ) from None
        if about["format"] != FORMAT:
            raise StoreError(
                f"{uri}: store format {about['format']}, this version reads {FORMAT}. Ingest into "
                "a new store, or use the version of diccae that wrote it."
            )
        return store

    @classmethod
    def exists(cls, uri: str) -> bool:
        """Whether there is a store at `uri`."""
        location = Location(uri)
        return bool(location.fs.exists(location.join(STORE_FILE)))

    @classmethod
    def create(cls, uri: str, spec: FeatureSpec) -> "FeatureStore":
        """A new, empty store; an existing one is opened.

        Raises: StoreError if there can be none at such a URI.
        """
        if cls.exists(uri):
            return cls.open(uri)
        store = cls(uri)
        kind = store.uri.partition("://")[0] if "://" in store.uri else "file"
        if kind not in _TABLE_KINDS:
            raise StoreError(
                f"{uri}: a store holds a Delta table, and that cannot lie on {kind}://. Possible: "
                f"a local path, {', '.join(f'{one}://' for one in _TABLE_KINDS[1:])}. Clips may "
                "come from anywhere."
            )
        store.location.fs.makedirs(store.location.path, exist_ok=True)
        store.write_spec(spec)
        DeltaTable.create(
            store._table_uri,
            CLIPS_SCHEMA,
            mode="ignore",
            configuration={
                "delta.checkpointInterval": str(_CHECKPOINT_EVERY),
                # Old versions are pinned by training runs; only `store vacuum` may drop them.
                "delta.enableExpiredLogCleanup": "false",
            },
            storage_options=store._options,
        )
        about = {"format": FORMAT, "id": uuid.uuid4().hex, "spec_hash": spec.spec_hash()}
        store.location.write_bytes(STORE_FILE, json.dumps(about).encode())
        return store

    @property
    def _table_uri(self) -> str:
        return f"{self.uri}/clips"

    def _load(self, version: int | None = None) -> DeltaTable:
        try:
            return DeltaTable(self._table_uri, version=version, storage_options=self._options)
        except TableNotFoundError as error:
            raise StoreError(
                f"{self._table_uri}: not a Delta table ({error}). The store is incomplete; "
                "ingest into a new one."
            ) from error

    def snapshot(self, version: int | None = None) -> Snapshot:
        """A version of the store, None for the newest.

        Raises: StoreError if the version does not exist or was vacuumed.
        """
        try:
            return Snapshot(self, self._load(version))
        except (DeltaError, OSError, ValueError) as error:
            raise StoreError(
                f"{self.uri}: version {version} cannot be read ({error}). "
                "Versions are kept by pins and by the retention of store vacuum."
            ) from error

    def append(self, rows: pa.Table, about: dict[str, Any]) -> int:
        """Commit clips rows (seq is set here; a clip at most once). Returns the new version.

        Raises: StoreError if the storage refuses; nothing of these rows is committed then.
        """
        try:
            return self._append(rows, about)
        except (DeltaError, OSError) as error:
            raise StoreError(
                f"{self.uri}: a commit failed ({error}). What was committed before is kept. Mend "
                "the storage, then run the same again."
            ) from error

    def _append(self, rows: pa.Table, about: dict[str, Any]) -> int:
        if self._table is None:
            self._table = self._load()
        self._table.update_incremental()
        seq = pa.array(np.full(len(rows), self._table.version() + 1, np.int64))
        index = CLIPS_SCHEMA.get_field_index("seq")
        rows = rows.set_column(index, CLIPS_SCHEMA.field(index), seq).cast(CLIPS_SCHEMA)
        write_deltalake(
            self._table,
            rows,
            mode="append",
            # Adds the columns that the table of an older store lacks.
            schema_mode="merge",
            commit_properties=CommitProperties(
                custom_metadata={key: str(value) for key, value in about.items()}
            ),
        )
        version = self._table.version()
        self._n_appended += 1
        if self._n_appended % _FOLD_EVERY == 0:
            # A commit costs time for each file of the table: small ones are put together.
            self._table.optimize.compact(target_size=_FOLDED_BYTES)
        return version

    def rewrite_log(self, rows: pa.Table) -> int:
        """Commit `rows` in place of the whole log (older versions keep theirs)."""
        table = self._load()
        write_deltalake(table, rows.cast(CLIPS_SCHEMA), mode="overwrite", schema_mode="merge")
        self._table = None
        return table.version()

    def drop_log_files(self, retention_hours: float, kept_versions: list[int]) -> None:
        """Delete files of the clips table that no version of `kept_versions` needs."""
        self._load().vacuum(
            retention_hours=int(retention_hours),
            dry_run=False,
            enforce_retention_duration=False,
            keep_versions=kept_versions,
        )

    def versions_since(self, moment: float) -> list[int]:
        """Versions committed at or after a time (Unix, s), and the one that was newest then."""
        commits = sorted(
            (int(match[1]), self.location.modified(entry))
            for entry in self.location.ls("clips/_delta_log")
            if (match := re.search(r"/(\d{20})\.json$", entry["name"]))
        )
        younger = [version for version, modified in commits if modified >= moment]
        older = [version for version, modified in commits if modified < moment]
        return older[-1:] + younger

    def pin(self, version: int, name: str) -> None:
        """Keep a version readable until `unpin(name)`, whatever vacuum does."""
        about = {"version": version, "pinned_at": datetime.now(UTC).isoformat()}
        self.location.write_bytes(f"pins/{name}.json", json.dumps(about).encode())

    def unpin(self, name: str) -> None:
        """Let go of a pin; nothing happens if there is none."""
        self.location.remove(f"pins/{name}.json")

    def pins(self) -> dict[str, int]:
        """Pinned versions by name."""
        names = [entry["name"].rsplit("/", 1)[-1] for entry in self.location.ls("pins")]
        return {
            name.removesuffix(".json"): json.loads(self.location.read_bytes(f"pins/{name}"))[
                "version"
            ]
            for name in names
            if name.endswith(".json")
        }

    def version(self) -> int:
        """The newest version."""
        return self._load().version()

    def initial_spec_hash(self) -> str:
        """Hash of the spec the store was created with."""
        return json.loads(self.location.read_bytes(STORE_FILE))["spec_hash"]

    def read_spec(self, spec_hash: str) -> FeatureSpec:
        """A spec that was used in this store, by its hash."""
        return FeatureSpec.model_validate_json(self.location.read_bytes(f"specs/{spec_hash}.json"))

    def write_spec(self, spec: FeatureSpec) -> None:
        """Keep a spec for `read_spec`."""
        self.location.write_bytes(f"specs/{spec.spec_hash()}.json", spec.canonical_json().encode())


def _subschema(names: list[str]) -> pa.Schema:
    return pa.schema([CLIPS_SCHEMA.field(name) for name in names])


def _newest_rows(log: pa.Table) -> np.ndarray:
    """Positions of the row with the highest seq of each clip_id."""
    newest_first = np.argsort(-log["seq"].to_numpy(), kind="stable")
    ids = log["clip_id"].take(newest_first).combine_chunks()
    first_position = pc.index_in(ids, value_set=pc.unique(ids)).to_numpy()
    _, first = np.unique(first_position, return_index=True)
    return newest_first[first]
