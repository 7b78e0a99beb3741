"""LeftOut: the clips that rules of the quality table keep out of a run or of an ingest.

Knows nothing of how a verdict came about. Invariant: a clip is left out only for what was measured
of the very content it has now, and which rules of which version did it is said with the result; of
equal clips one that is there now is never left out as a duplicate.
"""

import hashlib
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import StoreError
from pipeline.quality.kept import TWIN_COLUMNS, judged_anew
from pipeline.quality.rules import DUPLICATE, rules_named
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
    table = read_table(location, ["clip_id", "row_key", *_judged_by(rules)])
    assert table is not None
    states = snapshot.states(["clip_id", "row_key", "split"])
    ids = snapshot.rows(None)["clip_id"].combine_chunks()
    live = states.filter(pc.is_in(states["clip_id"], value_set=ids))
    mine = live.filter(pc.equal(live["split"], split))
    known = pc.is_in(mine["row_key"], value_set=table["row_key"].combine_chunks())
    if n_unknown := len(mine) - (pc.sum(known).as_py() or 0):
        raise StoreError(
            f"{snapshot.uri}: {n_unknown} of {len(mine)} clips of split {split!r} were not looked "
            f"at as they are now; run {_command(snapshot.uri)}, then this again"
        )
    # Clips of other splits do not go, and keep their duplicates of this one out.
    at = pc.index_in(table["row_key"], value_set=live["row_key"].combine_chunks())
    splits = live["split"].take(at).to_pylist()
    may_go = [one == split for one in splits]
    found = _hits_now(table, pc.is_valid(at).to_pylist(), splits, may_go, rules)
    return LeftOut(found.select(["clip_id", "rule"]), rules)


def without_left_out(location: Location, sources: pa.Table, names: tuple[str, ...]) -> pa.Table:
    """Sources (SOURCE_SCHEMA) but for those whose file, as it is now, hit any of the rules.

    Raises: as left_out; clips that were never looked at stay.
    """
    rules = _current_rules(location, names)
    table = read_table(location, ["clip_id", *_FILE, *_judged_by(rules)])
    assert table is not None
    at = pc.index_in(table["clip_id"], value_set=sources["clip_id"].combine_chunks())
    now = sources.take(at)
    is_there = [
        _is_same_file(measured, listed)
        for measured, listed in zip(
            table.select(_FILE).to_pylist(), now.select(_FILE).to_pylist(), strict=True
        )
    ]
    out = _hits_now(table, is_there, now["split"].to_pylist(), is_there, rules)["clip_id"]
    return sources.filter(pc.invert(pc.is_in(sources["clip_id"], value_set=out.combine_chunks())))


_FILE = ["start_s", "end_s", "size", "mtime_ns", "fp_kind", "fp"]


def _is_same_file(measured: dict[str, Any], listed: dict[str, Any]) -> bool:
    """Whether a listed clip (columns _FILE; nulls: not listed) is what was measured."""
    if listed["size"] is None:
        return False
    names = ["start_s", "end_s", "size", "mtime_ns"]
    # A listing holds no content hash; where the store has one, the stat speaks for it.
    if measured["fp_kind"] != "sha256":
        names.append("fp")  # On object stores mtime_ns is 0, whatever was written there.
    return all(measured[name] == listed[name] for name in names)


def _judged_by(rules: dict[str, int]) -> list[str]:
    """Columns of the table that `_hits_now` needs."""
    return [*rules, *(TWIN_COLUMNS if DUPLICATE in rules else [])]


def _hits_now(
    table: pa.Table,
    is_there: list[bool],
    splits: list[str | None],
    may_go: list[bool],
    rules: dict[str, int],
) -> pa.Table:
    """Rows that may go and hit any of the rules, with the first one in the column `rule`.

    Of equal clips one stays among those that are there and that no other of the rules takes.
    """
    going = pa.array(may_go, pa.bool_())
    if DUPLICATE in rules:
        others = hits(table.filter(going), [name for name in rules if name != DUPLICATE])
        taken = pc.is_in(table["clip_id"], value_set=others["clip_id"].combine_chunks())
        stays = pc.and_not(pa.array(is_there, pa.bool_()), taken)
        table = judged_anew(table, splits, stays.to_pylist())
    return hits(table.filter(going), list(rules))


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
