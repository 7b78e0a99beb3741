"""QualityTable: what is known of the clips of a store, kept in the store beside the features.

Knows nothing of how signals are measured. Invariant: `quality/table.parquet` is whole and says, in
its metadata, which version of the clips table it was made from and by which rules; a row speaks of
one content of one clip (row_key, or the file of a clip that has no features). Who replaces the
table holds `table_lease` from the reading on, so that calls at one time lose nothing of each other.

quality/table.parquet    one row per clip: signals, a verdict per rule, duplicate_of
quality/prints.parquet   what duplicates are found by, a few kB a clip
quality/parts/           what a scan that was stopped, or is still at work, has measured
quality/lease/           who replaces the table
"""

import json
import uuid
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import LEASE_STALE_S
from pipeline.errors import StoreError
from pipeline.quality.rules import RULES, rules_named
from pipeline.storage import Location
from pipeline.store.lease import Lease
from pipeline.store.schema import SOURCE_SCHEMA

FILE = "quality/table.parquet"
_PRINTS_FILE = "quality/prints.parquet"
_PARTS = "quality/parts"
_ABOUT = b"diccae.quality"

_IDENTITY = [
    *(SOURCE_SCHEMA.field(name) for name in ("clip_id", "uri", "start_s", "end_s", "split")),
    *(SOURCE_SCHEMA.field(name) for name in ("fp_kind", "fp", "size", "mtime_ns")),
    pa.field("row_key", pa.string()),
    pa.field("measured_by", pa.int32()),
    pa.field("source", pa.string()),
]
"""Which content of which clip, by which version of the measurement, and what became of its source:
`read`, `gone`, `changed` (since its ingest), `unreachable`, `unreadable` or `not asked`."""
_SIGNALS = [
    pa.field(name, pa.float32())
    for name in dict.fromkeys(rule.signal for rule in RULES)
    if name != "sameness"
]
_PRINTS = [
    pa.field("picture", pa.large_binary()),
    pa.field("times_ms", pa.list_(pa.int32())),
    pa.field("sound", pa.large_binary()),
]
MEASURED_SCHEMA = pa.schema([*_IDENTITY, *_SIGNALS, *_PRINTS])
"""What a scan measures of one clip."""

_TWINS = [
    pa.field("twins", pa.list_(pa.string())),
    pa.field("twin_sameness", pa.list_(pa.float32())),
    pa.field("duplicate_of", pa.string()),
    pa.field("sameness", pa.float32()),
]
TABLE_SCHEMA = pa.schema(
    [
        *(field for field in MEASURED_SCHEMA if field not in _PRINTS),
        *_TWINS,
        pa.field("in_store", pa.bool_()),
        *(pa.field(rule.name, pa.bool_()) for rule in RULES),
    ]
)
"""The quality table. A rule's column is null where it was not judged; `duplicate_of` names the clip
that is kept of several equal ones."""


def read_table(location: Location, columns: list[str] | None = None) -> pa.Table | None:
    """The quality table of a store; None if it was never made."""
    return _read(location, FILE, columns)


def read_about(location: Location) -> dict[str, Any]:
    """What the table was made from: {"version", "spec_hash", "rules": {name: version}}.

    Raises: StoreError if there is no table.
    """
    try:
        with location.fs.open(location.join(FILE), "rb") as file:
            about: dict[str, Any] = json.loads(pq.read_schema(file).metadata[_ABOUT])
            return about
    except FileNotFoundError:
        raise no_table(location.uri) from None


def no_table(uri: str) -> StoreError:
    """The error of a store whose clips were never looked at."""
    return StoreError(
        f"{uri}: no quality table ({FILE} is missing), so no clip can be left out by rule. Make it "
        f'with "diccae store quality --store {uri}".'
    )


class Measured(NamedTuple):
    """Everything that was measured so far."""

    clips: pa.Table
    """Columns of MEASURED_SCHEMA and the twins found before, one row a clip."""
    parts: list[str]
    """Names of the parts that went into it."""


def table_lease(location: Location) -> Lease:
    """The right to replace the table, for the moments between `read_measured` and `write_table`;
    who comes second waits."""
    return Lease(location.below("quality"), LEASE_STALE_S, "store quality", waits=True)


def read_measured(location: Location) -> Measured:
    """Table, prints and the parts of scans; a row of a part wins over that of the table."""
    columns = [*MEASURED_SCHEMA, *_TWINS[:2]]
    schema = pa.schema(columns)
    tables = [schema.empty_table()]
    table, prints = read_table(location), _read(location, _PRINTS_FILE)
    if table is not None and prints is not None:
        tables.append(_with_prints(table, prints).select(schema.names).cast(schema))
    parts = [f"{_PARTS}/{name}" for name in location.files(_PARTS)]
    for name in parts:
        part = _read(location, name)
        if part is not None and part.schema.names == MEASURED_SCHEMA.names:
            for field in _TWINS[:2]:
                part = part.append_column(field, pa.nulls(len(part), field.type))
            tables.append(part.cast(schema))
    return Measured(_last_of_each(pa.concat_tables(tables)), parts)


def write_part(location: Location, measured: pa.Table) -> None:
    """Keep what a scan has measured until `write_table`."""
    location.write_bytes(f"{_PARTS}/{uuid.uuid4().hex}.parquet", _to_bytes(measured))


def write_table(
    location: Location,
    table: pa.Table,
    prints: pa.Table,
    about: dict[str, Any],
    *,
    parts: list[str],
) -> None:
    """Replace the quality table; only for who holds `table_lease`.

    Args: table: TABLE_SCHEMA; prints: rows in the same order; parts: those that are in the table.
    """
    location.write_bytes(
        _PRINTS_FILE, _to_bytes(prints.select(["clip_id", "row_key", *_names(_PRINTS)]))
    )
    named = table.cast(TABLE_SCHEMA).replace_schema_metadata({_ABOUT: json.dumps(about)})
    location.write_bytes(FILE, _to_bytes(named))
    for name in parts:
        location.remove(name)


def hits(table: pa.Table, names: list[str]) -> pa.Table:
    """Rows that hit any of these rules, with the first one in the column `rule`."""
    found = pa.nulls(len(table), pa.string())
    for rule in reversed(rules_named(names)):
        found = pc.if_else(table[rule.name].fill_null(False), rule.name, found)
    return table.append_column("rule", found).filter(pc.is_valid(found))


def _with_prints(table: pa.Table, prints: pa.Table) -> pa.Table:
    """Rows of the table whose prints are there: a stop between the two writes may leave others."""
    position = pc.index_in(table["clip_id"], value_set=prints["clip_id"].combine_chunks())
    theirs = prints.take(position)
    same = pc.equal(table["row_key"].fill_null(""), theirs["row_key"].fill_null(""))
    for field in _PRINTS:
        table = table.append_column(field, theirs[field.name])
    return table.filter(pc.and_(pc.is_valid(position), same))


def _names(fields: list[pa.Field]) -> list[str]:
    return [field.name for field in fields]


def _read(location: Location, name: str, columns: list[str] | None = None) -> pa.Table | None:
    try:
        return pq.read_table(pa.BufferReader(location.read_bytes(name)), columns=columns)
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid as error:
        raise StoreError(
            f"{location.join(name)}: not a whole Parquet file ({error}). Delete it, then run "
            f'"diccae store quality --store {location.uri}" again.'
        ) from error


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="ZSTD")
    return bytes(sink.getvalue())


def _last_of_each(table: pa.Table) -> pa.Table:
    """The last row of each clip_id."""
    position = {clip_id: i for i, clip_id in enumerate(table["clip_id"].to_pylist())}
    return table.take(pa.array(sorted(position.values()), pa.int64())).combine_chunks()
