"""LeftOut: the clips that rules of the quality table keep out of a run or of an ingest.

Knows nothing of how a verdict came about. Invariant: a clip is left out only for what was measured
of the very content it has now, and which rules of which version did it is said with the result.
"""

import hashlib
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import StoreError
from pipeline.quality.rules import rules_named
from pipeline.quality.table import hits, read_about, read_table
from pipeline.storage import Location
from pipeline.store.store import Snapshot


class LeftOut(NamedTuple):
    """Clips, and what decided it."""

    clips: pa.Table
    """clip_id and rule, the first one hit."""
    rules: dict[str, int]
    """Version of each rule by its name."""

    def about(self) -> dict[str, Any]:
        """What a run's record keeps: rules, number of clips, and a digest of their ids."""
        ids = "\0".join(sorted(self.clips["clip_id"].to_pylist()))
        digest = hashlib.sha256(ids.encode()).hexdigest()[:16]
        return {"rules": self.rules, "clips": len(self.clips), "digest": digest}


def left_out(snapshot: Snapshot, split: str, names: tuple[str, ...]) -> LeftOut:
    """Live clips of a split that hit any of the rules.

    Raises: SourceError for a rule that there is not; StoreError if the clips were not looked at as
        they are now.
    """
    location = Location(snapshot.uri)
    rules = _current_rules(location, names)
    columns = ["clip_id", "row_key", *rules]
    table = read_table(location, columns)
    assert table is not None
    states = snapshot.states(["clip_id", "row_key"])
    live = snapshot.rows(split)["clip_id"]
    mine = states.filter(pc.is_in(states["clip_id"], value_set=live.combine_chunks()))
    position = pc.index_in(mine["row_key"], value_set=table["row_key"].combine_chunks())
    n_unknown = position.null_count
    if n_unknown:
        raise StoreError(
            f"{snapshot.uri}: {n_unknown} of {len(mine)} clips of split {split!r} were not looked "
            f"at as they are now; run {_command(snapshot.uri)}, then this again"
        )
    found = hits(table.take(position), list(rules))
    return LeftOut(found.select(["clip_id", "rule"]), rules)


def without_left_out(location: Location, sources: pa.Table, names: tuple[str, ...]) -> pa.Table:
    """Sources (SOURCE_SCHEMA) but for those whose file, as it is now, hit any of the rules.

    Raises: as left_out; clips that were never looked at stay.
    """
    rules = _current_rules(location, names)
    identity = ["clip_id", "start_s", "end_s", "size", "mtime_ns"]
    table = read_table(location, [*identity, *rules])
    assert table is not None
    hit = hits(table, list(rules)).select(identity).to_pylist()
    out = {tuple(row.values()) for row in hit if row["size"] is not None}
    rows = sources.select(identity).to_pylist()
    return sources.filter(pa.array([tuple(row.values()) not in out for row in rows], pa.bool_()))


def _current_rules(location: Location, names: tuple[str, ...]) -> dict[str, int]:
    """The rules by name with their version, which is that of the table."""
    rules = {rule.name: rule.version for rule in rules_named(names)}
    judged = read_about(location)["rules"]
    old = [name for name, version in rules.items() if judged.get(name) != version]
    if old:
        raise StoreError(
            f"{location.uri}: the quality table was judged by other versions of {', '.join(old)}; "
            f"run {_command(location.uri)}, which takes seconds when nothing else is new"
        )
    return rules


def _command(uri: str) -> str:
    return f'"diccae store quality --store {uri}"'
