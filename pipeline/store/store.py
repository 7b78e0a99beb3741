"""FeatureStore: one URI with Parquet shards and the clips table that says which rows count.

Knows nothing of decoding or of Ray. Invariant: the clips table, a Delta table, is the truth and
the only commit point: a feature row exists if and only if a clips row of status ok points at it,
and every commit builds on the version its writer has seen. A version pins a data set for ever.

The table is a log: a commit only appends, so that its cost depends on neither the clips already
there nor the commits before (log.LogKeys says which rows count).
"""

import contextlib
import json
import platform
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from pipeline.config import FeatureSpec
from pipeline.errors import StoreError
from pipeline.storage import Location, delta_options
from pipeline.store.identity import STORE_FILE
from pipeline.store.lease import Lease
from pipeline.store.schema import CLIPS_SCHEMA, FORMAT, OLDEST_FORMAT, SPEC_PROPERTY
from pipeline.store.shards import read_rows
from pipeline.store.snapshot import Snapshot

__all__ = ["FeatureStore", "Snapshot", "read_rows"]

_TABLE_KINDS = ("file", "s3", "s3a", "gs", "az", "abfs", "abfss", "hdfs")
_UNFIT = re.compile(r"%[0-9A-Fa-f]{2}|[\[\]\\]")
"""The library takes %20 for a space, and panics at brackets."""
_CHECKPOINT_EVERY = 50
_FOLD_EVERY = 64
_FOLDED_BYTES = 32 << 20
_MOST_TRIES = 20
"""Commits of others that one commit gives way to before it gives up."""


def _refuse_place_without_tables(uri: str, whole: str) -> None:
    """Raises: StoreError if no Delta table can lie at a URI."""
    kind = whole.partition("://")[0] if "://" in whole else "file"
    if kind not in _TABLE_KINDS:
        raise StoreError(
            f"{uri}: a store holds a Delta table, and that cannot lie on {kind}://. Possible: "
            f"a local path, {', '.join(f'{one}://' for one in _TABLE_KINDS[1:])}. Clips may "
            "come from anywhere."
        )
    if unfit := _UNFIT.search(whole):
        raise StoreError(
            f"{uri}: a store holds a Delta table, and that cannot lie below a folder with "
            f"{unfit[0]!r} in its name. Name another folder."
        )


class FeatureStore:
    """A store that exists. Make one with `create`, or `open` it."""

    def __init__(self, uri: str) -> None:
        self.location = Location(uri)
        self.uri = self.location.uri
        self._options = delta_options()
        self._table: DeltaTable | None = None

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
                '"diccae ingest --videos DIR --store URI".'
            ) from None
        if not OLDEST_FORMAT <= about["format"] <= FORMAT:
            raise StoreError(
                f"{uri}: store format {about['format']}, this version reads {OLDEST_FORMAT} to "
                f"{FORMAT}. Ingest into a new store, or use the version of diccae that wrote it."
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
        _refuse_place_without_tables(uri, store.uri)
        store.write_spec(spec)
        with store.location.asked_if_slow():
            DeltaTable.create(
                store._table_uri,
                CLIPS_SCHEMA,
                mode="ignore",
                configuration={
                    "delta.checkpointInterval": str(_CHECKPOINT_EVERY),
                    # Old versions are pinned by training runs; only `store vacuum` may drop them.
                    "delta.enableExpiredLogCleanup": "false",
                    SPEC_PROPERTY: spec.spec_hash(),
                },
                raise_if_key_not_exists=False,
                storage_options=store._options,
            )
        about = {"format": FORMAT, "id": uuid.uuid4().hex, "spec_hash": spec.spec_hash()}
        # Of two that make it at once the second opens what the first made: all know one id.
        if not store.location.create_bytes(STORE_FILE, json.dumps(about).encode()):
            return cls.open(uri)
        return store

    @property
    def _table_uri(self) -> str:
        return f"{self.uri}/clips"

    def _load(self, version: int | None = None) -> DeltaTable:
        try:
            with self.location.asked_if_slow():
                return DeltaTable(self._table_uri, version=version, storage_options=self._options)
        except TableNotFoundError as error:
            raise StoreError(
                f"{self._table_uri}: not a Delta table ({error}). The store is incomplete; "
                "ingest into a new one."
            ) from error

    def _newest(self) -> DeltaTable:
        """The table as it is now. Never handed out: it moves on with the next call."""
        if self._table is None:
            self._table = self._load()
        else:
            with self.location.asked_if_slow():
                self._table.update_incremental()
        return self._table

    def snapshot(self, version: int | None = None) -> Snapshot:
        """A version of the store, None for the newest.

        Raises: StoreError if the version does not exist or was vacuumed.
        """
        try:
            return Snapshot(self, self._load(version))
        except (DeltaError, OSError, ValueError, OverflowError) as error:
            newest = self.version()
            if version is not None and not 0 <= version <= newest:
                raise StoreError(
                    f"{self.uri}: no version {version}; there are 0 to {newest}, and "
                    f'"diccae store versions --store {self.uri}" says what they are'
                ) from None
            raise StoreError(
                f"{self.uri}: version {version} cannot be read ({error}). "
                "Versions are kept by pins and by the retention of store vacuum."
            ) from error

    @contextlib.contextmanager
    def lease(self, stale_s: float, purpose: str) -> Iterator[Lease]:
        """Be the one writer; a store of an older format becomes one of this.

        Raises: StoreLocked; StoreError if the storage refuses.
        """
        with Lease(self.location, stale_s, purpose) as lease:
            if SPEC_PROPERTY not in self._newest().metadata().configuration:
                newest = self.snapshot()
                # First the format: an older diccae would go on deriving the spec from the rows.
                about = json.loads(self.location.read_bytes(STORE_FILE)) | {"format": FORMAT}
                self.location.write_bytes(STORE_FILE, json.dumps(about).encode())
                self._put_in_force(newest.spec_hash, {"by": "upgrade"}, lease.check)
            yield lease

    def append(
        self, rows: pa.Table, about: dict[str, Any], check: Callable[[], None] | None = None
    ) -> int:
        """Commit clips rows (seq is set here; a clip at most once). Returns the new version.

        Args: check: called between reading the newest version and committing on top of it, so that
            a writer that lost its lease (Lease.check) cannot commit over its successor.
        Raises: StoreError if the storage refuses; nothing of these rows is committed then.
        """

        def write(table: DeltaTable, properties: CommitProperties) -> None:
            seq = pa.array(np.full(len(rows), table.version() + 1, np.int64))
            index = CLIPS_SCHEMA.get_field_index("seq")
            stamped = rows.set_column(index, CLIPS_SCHEMA.field(index), seq).cast(CLIPS_SCHEMA)
            write_deltalake(
                table,
                stamped,
                mode="append",
                # Adds the columns that the table of an older store lacks.
                schema_mode="merge",
                commit_properties=properties,
            )

        return self._commit(write, about, check)

    def put_in_force(
        self, spec: FeatureSpec, about: dict[str, Any], check: Callable[[], None] | None = None
    ) -> int:
        """Commit that the data set is that of `spec` from now on. Returns the new version.

        Args, raises: as append.
        """
        self.write_spec(spec)
        return self._put_in_force(spec.spec_hash(), about, check)

    def _put_in_force(
        self, spec_hash: str, about: dict[str, Any], check: Callable[[], None] | None
    ) -> int:
        def write(table: DeltaTable, properties: CommitProperties) -> None:
            table.alter.set_table_properties(
                {SPEC_PROPERTY: spec_hash},
                raise_if_not_exists=False,
                commit_properties=properties,
            )

        return self._commit(write, about, check)

    def rewrite_log(
        self,
        rows: pa.Table,
        read_version: int,
        check: Callable[[], None] | None = None,
        *,
        by: str = "",
    ) -> int:
        """Commit `rows`, made from `read_version`, in place of the whole log.

        Older versions keep theirs. Args: by: what rewrites it, if something else than compact or
        vacuum; check: as append. Raises: StoreError if another version was committed meanwhile,
        whose rows would be lost, or if the storage refuses.
        """

        def write(table: DeltaTable, properties: CommitProperties) -> None:
            if table.version() != read_version:
                raise StoreError(
                    f"{self.uri}: version {table.version()} was committed while version "
                    f"{read_version} was being rewritten. No row is lost; run the same again."
                )
            write_deltalake(
                table,
                rows.cast(CLIPS_SCHEMA),
                mode="overwrite",
                schema_mode="merge",
                commit_properties=properties,
            )

        about = {"read_version": read_version} | ({"by": by} if by else {})
        return self._commit(write, about, check)

    def _commit(
        self,
        write: Callable[[DeltaTable, CommitProperties], None],
        about: dict[str, Any],
        check: Callable[[], None] | None,
    ) -> int:
        """Have `write` commit exactly the version after the newest. Returns that version."""
        properties = CommitProperties(
            custom_metadata={key: str(value) for key, value in about.items()},
            # Never rebased by the library: whoever commits has seen all that was there before, and
            # a seq made from the version is no one else's.
            max_commit_retries=0,
        )
        refused: Exception | None = None
        try:
            for _ in range(_MOST_TRIES):
                table = self._newest()
                if check is not None:
                    check()
                try:
                    with self.location.asked_if_slow():
                        write(table, properties)
                except CommitFailedError as error:
                    refused, self._table = error, None
                    continue
                version: int = table.version()
                if version % _FOLD_EVERY == 0:
                    self._fold_files(table)
                return version
        except (DeltaError, OSError) as error:
            refused = error
        raise StoreError(
            f"{self.uri}: a commit failed ({refused}). What was committed before is kept. Mend "
            "the storage, then run the same again."
        ) from refused

    def _fold_files(self, table: DeltaTable) -> None:
        """Put small files of the table together: reading costs time for each one."""
        # A rewrite of the log meanwhile has done more than this would.
        with contextlib.suppress(CommitFailedError):
            table.optimize.compact(target_size=_FOLDED_BYTES)

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

    def pin(self, version: int, name: str, run: str = "") -> None:
        """Keep a version readable until `unpin(name)`, whatever vacuum does.

        Args: run: URI of the run folder that reads it.
        """
        about = {"version": version, "pinned_at": datetime.now(UTC).isoformat(), "run": run}
        about["machine"] = platform.node()
        self.location.write_bytes(f"pins/{name}.json", json.dumps(about).encode())

    def unpin(self, name: str) -> None:
        """Let go of a pin; nothing happens if there is none."""
        self.location.remove(f"pins/{name}.json")

    def pins(self) -> dict[str, int]:
        """Pinned versions by name."""
        return {name: int(about["version"]) for name, about in self.pins_in_full().items()}

    def pins_in_full(self) -> dict[str, dict[str, Any]]:
        """What each pin says, by name: version, pinned_at, run and the machine it was made on
        (those of before have none)."""
        return {
            name.removesuffix(".json"): json.loads(self.location.read_bytes(f"pins/{name}"))
            for name in self.location.files("pins")
            if name.endswith(".json")
        }

    def history(self) -> list[dict[str, Any]]:
        """What Delta and our commits say of each version, newest first: version, timestamp (ms),
        operation, operationParameters; run_id of an ingest, or by."""
        return list(self._newest().history())

    def version(self) -> int:
        """The newest version."""
        return int(self._newest().version())

    def initial_spec_hash(self) -> str:
        """Hash of the spec the store was created with."""
        return str(json.loads(self.location.read_bytes(STORE_FILE))["spec_hash"])

    def read_spec(self, spec_hash: str) -> FeatureSpec:
        """A spec that was used in this store, by its hash."""
        return FeatureSpec.model_validate_json(self.location.read_bytes(f"specs/{spec_hash}.json"))

    def specs_since(self, moment: float) -> set[str]:
        """Hashes of specs that were decoded for or put in force at or after a time (Unix, s)."""
        return {
            entry["name"].rsplit("/", 1)[-1].removesuffix(".json")
            for entry in self.location.ls("specs")
            if self.location.modified(entry) >= moment
        }

    def write_spec(self, spec: FeatureSpec) -> None:
        """Keep a spec for `read_spec`, and when it was last used for `specs_since`."""
        self.location.write_bytes(f"specs/{spec.spec_hash()}.json", spec.canonical_json().encode())
