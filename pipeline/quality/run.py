"""check_quality: brings the quality table of a store up to its newest version.

Composes scan, duplicates, rules and table; knows nothing of the screen. Invariant: only clips that
are new, changed or measured by an older version are looked at, and what a stopped run has measured
is not measured again; calls at one time take in what the others measured.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import StoreError
from pipeline.quality.duplicates import Prints, find_twins
from pipeline.quality.kept import choose_kept
from pipeline.quality.rules import RULES
from pipeline.quality.scan import MEASURED_BY, ScanSettings, scan
from pipeline.quality.table import (
    FILE,
    MEASURED_SCHEMA,
    TABLE_SCHEMA,
    read_about,
    read_measured,
    read_table,
    table_lease,
    write_part,
    write_table,
)
from pipeline.source.fetch import is_local_file
from pipeline.store.store import FeatureStore, Snapshot

_KEEP_EVERY_CLIPS = 4096
_KEEP_EVERY_S = 30.0
_STATE_COLUMNS = [
    *("clip_id", "uri", "start_s", "end_s", "split", "fp_kind", "fp", "size", "mtime_ns"),
    *("row_key", "status", "reason", "spec_hash", "shard", "row"),
]


@dataclass(frozen=True)
class Progress:
    """How far a scan is."""

    total: int
    done: int
    clips_per_s: float
    eta_s: float | None


@dataclass(frozen=True)
class RuleCount:
    """What became of one rule over the clips of a split."""

    rule: str
    """Name and version."""
    hits: int
    judged: int
    examples: list[str]


@dataclass(frozen=True)
class QualitySummary:
    """What `store quality` shows."""

    version: int
    spec_hash: str
    clips: int
    """Clips of the split (None: all), failed ones among them."""
    looked_at: int
    """Clips this call measured."""
    rules: list[RuleCount]
    sources: dict[str, int]
    """What became of the sources: all but `read` leave rules unjudged."""
    not_judged: dict[str, int]
    """Clips of the store that a rule says nothing of, by rule."""
    table: str
    seconds: float


def check_quality(
    uri: str,
    split: str | None = None,
    *,
    reads_sources: bool = True,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> QualitySummary:
    """Measure what is new, find duplicates, judge by all rules, write the table.

    Args: split: look at clips of this split only; rows of others stay as they are.
    Raises: StoreError; StoreLocked if this call was silent while it wrote, and another took over;
        KeyboardInterrupt (what is measured is kept).
    """
    started = time.monotonic()
    store = FeatureStore.open(uri)
    snapshot = store.snapshot()
    states = _states(snapshot)
    if split is not None:
        refuse_no_clips(snapshot, states, split)
    todo = _todo(states, read_measured(store.location).clips, split, reads_sources)
    settings = ScanSettings(store.uri, snapshot.spec, reads_sources)
    fresh = _measure(store, todo, settings, workers, on_progress)
    try:
        snapshot, table = _brought_in(store, snapshot, fresh, reads_sources)
    except BaseException:
        if len(fresh):
            write_part(store.location, fresh)
        raise
    mine = table.filter(table["in_store"])
    if split is not None:
        mine = mine.filter(pc.equal(mine["split"], split))
    return _summary(store, snapshot, mine, looked_at=len(fresh), started=started)


def _brought_in(
    store: FeatureStore, snapshot: Snapshot, fresh: pa.Table, reads_sources: bool
) -> tuple[Snapshot, pa.Table]:
    """Replace the quality table by one that holds `fresh`, too.

    Returns: what it was made from and the table. Another call may have written meanwhile: what it
    measured stays, and a newer version that it has seen is not taken back.
    """
    with table_lease(store.location) as lease:
        known = read_measured(store.location)
        if read_table(store.location, ["clip_id"]) is not None:
            newest = read_about(store.location)["version"]
            snapshot = store.snapshot() if newest > snapshot.version else snapshot
        states = _states(snapshot)
        # Not what another call measured of the same content, which may say more.
        wanted = _todo(states, known.clips, None, reads_sources)["clip_id"].combine_chunks()
        fresh = fresh.filter(pc.is_in(fresh["clip_id"], value_set=wanted))
        measured = _merged(known.clips, fresh)
        table = _judged(measured, fresh["clip_id"], states)
        about = {
            "version": snapshot.version,
            "spec_hash": snapshot.spec_hash,
            "rules": {rule.name: rule.version for rule in RULES},
        }
        lease.check()
        write_table(store.location, table, measured, about, parts=known.parts)
    return snapshot, table


def _summary(
    store: FeatureStore, snapshot: Snapshot, mine: pa.Table, *, looked_at: int, started: float
) -> QualitySummary:
    """Args: mine: rows of the quality table that were asked for; started: monotonic seconds."""
    return QualitySummary(
        version=snapshot.version,
        spec_hash=snapshot.spec_hash,
        clips=len(mine),
        looked_at=looked_at,
        rules=[_count(mine, rule.name, rule.stamp) for rule in RULES],
        sources=dict(Counter(mine["source"].to_pylist()).most_common()),
        not_judged={
            rule.name: mine[rule.name].null_count for rule in RULES if mine[rule.name].null_count
        },
        table=f"{store.uri}/{FILE}",
        seconds=round(time.monotonic() - started, 2),
    )


def refuse_no_clips(snapshot: Snapshot, clips: pa.Table, split: str) -> None:
    """Raises: StoreError if none of `clips` is of the split; it names those there are."""
    splits = set(pc.unique(clips["split"]).to_pylist())
    if split not in splits:
        raise StoreError(
            f"{snapshot.uri}: no clip in split {split!r} at version {snapshot.version}; there are "
            f"{', '.join(sorted(map(str, splits))) or 'no clips at all'}"
        )


def _states(snapshot: Snapshot) -> pa.Table:
    """The clips of the store; one whose features are of another spec counts as without any."""
    states = snapshot.states(_STATE_COLUMNS)
    live = pc.and_(
        pc.equal(states["status"], "ok"), pc.equal(states["spec_hash"], snapshot.spec_hash)
    )
    for name in ("row_key", "shard", "row"):
        index = states.column_names.index(name)
        kept = pc.if_else(live, states[name], pa.scalar(None, states[name].type))
        states = states.set_column(index, name, kept)
    return states


def _identity(table: pa.Table) -> list[tuple[Any, ...]]:
    """What a measurement speaks of: features by their key, a clip without any by its file."""
    file = zip(
        *(table[n].to_pylist() for n in ("uri", "start_s", "end_s", "fp", "size")), strict=True
    )
    keys = table["row_key"].to_pylist()
    return [(key,) if key else one for key, one in zip(keys, file, strict=True)]


def _todo(states: pa.Table, known: pa.Table, split: str | None, reads_sources: bool) -> pa.Table:
    if split is not None:
        states = states.filter(pc.equal(states["split"], split))
    done = {
        clip_id: (identity, source, by)
        for clip_id, identity, source, by in zip(
            known["clip_id"].to_pylist(),
            _identity(known),
            known["source"].to_pylist(),
            known["measured_by"].to_pylist(),
            strict=True,
        )
    }
    is_todo = []
    for clip_id, uri, identity in zip(
        states["clip_id"].to_pylist(), states["uri"].to_pylist(), _identity(states), strict=True
    ):
        before = done.get(clip_id)
        fits = before is not None and (before[0], before[2]) == (identity, MEASURED_BY)
        again = reads_sources and fits and before is not None and _is_back(before[1], uri)
        is_todo.append(not fits or again)
    return states.filter(pa.array(is_todo, pa.bool_()))


def _is_back(source: str, uri: str) -> bool:
    """Whether a source that could not be read may be readable by now."""
    if source in ("not asked", "unreachable"):
        return True
    if source != "gone" or not is_local_file(uri):
        return False
    return os.path.exists(uri.removeprefix("file://"))


def _measure(
    store: FeatureStore,
    todo: pa.Table,
    settings: ScanSettings,
    workers: int | None,
    on_progress: Callable[[Progress], None],
) -> pa.Table:
    """What scan gives, kept in parts on the way."""
    began = kept_at = time.monotonic()
    done: list[pa.Table] = []
    waiting: list[pa.Table] = []
    n_done = 0
    try:
        for measured in scan(todo, settings, workers):
            waiting.append(measured)
            n_done += len(measured)
            is_late = time.monotonic() - kept_at > _KEEP_EVERY_S
            if sum(map(len, waiting)) >= _KEEP_EVERY_CLIPS or (is_late and n_done < len(todo)):
                write_part(store.location, pa.concat_tables(waiting))
                done, waiting, kept_at = done + waiting, [], time.monotonic()
            rate = n_done / max(time.monotonic() - began, 1e-3)
            on_progress(Progress(len(todo), n_done, rate, (len(todo) - n_done) / rate))
    except BaseException:
        if waiting:
            write_part(store.location, pa.concat_tables(waiting))
        raise
    return pa.concat_tables([MEASURED_SCHEMA.empty_table(), *done, *waiting])


def _merged(known: pa.Table, fresh: pa.Table) -> pa.Table:
    """Known rows, those measured again replaced; twins of what is measured anew are forgotten."""
    stale = pc.is_in(known["clip_id"], value_set=fresh["clip_id"].combine_chunks())
    kept = known.filter(pc.invert(stale))
    for name in ("twins", "twin_sameness"):
        fresh = fresh.append_column(name, pa.nulls(len(fresh), known.schema.field(name).type))
    return pa.concat_tables([kept, fresh.cast(known.schema)]).combine_chunks()


def _judged(measured: pa.Table, fresh_ids: pa.ChunkedArray, states: pa.Table) -> pa.Table:
    """The quality table, rows in the order of `measured`."""
    ids = measured["clip_id"].to_pylist()
    now = dict(zip(states["clip_id"].to_pylist(), _identity(states), strict=True))
    in_store = [
        now.get(clip_id) == identity
        for clip_id, identity in zip(ids, _identity(measured), strict=True)
    ]
    measured = _restated(measured, in_store, states)
    never = pc.is_null(measured["twins"]).to_pylist()
    fresh = set(fresh_ids.to_pylist())
    is_new = np.array([new or clip_id in fresh for clip_id, new in zip(ids, never, strict=True)])
    twins = _all_twins(measured, is_new)
    splits = measured["split"].to_pylist()
    kept_of, sameness = choose_kept(ids, splits, in_store, twins)
    has_print = pc.is_valid(measured["picture"]).to_pylist()
    columns = {
        "twins": [sorted(twins[i]) for i in ids],
        "twin_sameness": [[twins[i][t] for t in sorted(twins[i])] for i in ids],
        "duplicate_of": [kept_of.get(i) for i in ids],
        "sameness": [
            sameness.get(i, 0.0) if has else None for i, has in zip(ids, has_print, strict=True)
        ],
        "in_store": in_store,
    }
    table = measured.select([n for n in TABLE_SCHEMA.names if n in MEASURED_SCHEMA.names])
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, TABLE_SCHEMA.field(name).type))
    for rule in RULES:
        table = table.append_column(rule.name, rule.verdicts(table))
    return table.select(TABLE_SCHEMA.names)


def _restated(measured: pa.Table, in_store: list[bool], states: pa.Table) -> pa.Table:
    """Measured rows with what the store says of a clip by now: a list may give it another split,
    and its file another place or time, without any change of what was measured."""
    at = pc.index_in(measured["clip_id"], value_set=states["clip_id"].combine_chunks())
    now = states.take(at)
    for name in ("uri", "split", "mtime_ns"):
        # Another content of the clip is for its own look to describe.
        column = pc.if_else(pa.array(in_store, pa.bool_()), now[name], measured[name])
        measured = measured.set_column(measured.column_names.index(name), name, column)
    return measured


def _all_twins(measured: pa.Table, is_new: np.ndarray) -> dict[str, dict[str, float]]:
    """clip_id -> its twins and how alike they are: those known before, and those of new clips."""
    ids = measured["clip_id"].to_pylist()
    new_ids = {clip_id for clip_id, new in zip(ids, is_new, strict=True) if new}
    twins: dict[str, dict[str, float]] = {clip_id: {} for clip_id in ids}
    for clip_id, others, scores in zip(
        ids, measured["twins"].to_pylist(), measured["twin_sameness"].to_pylist(), strict=True
    ):
        for other, score in zip(others or [], scores or [], strict=True):
            if clip_id not in new_ids and other in twins and other not in new_ids:
                twins[clip_id][other] = score
    at = np.flatnonzero(pc.is_valid(measured["picture"]).to_numpy())
    some = measured.take(pa.array(at))
    prints = [
        Prints.of(*columns)
        for columns in zip(
            *(some[name].to_pylist() for name in ("picture", "times_ms", "sound")), strict=True
        )
    ]
    for pair in find_twins(prints, is_new[at]):
        first, second = ids[at[pair.first]], ids[at[pair.second]]
        twins[first][second] = twins[second][first] = pair.sameness
    return twins


def _count(table: pa.Table, name: str, stamp: str) -> RuleCount:
    hit = table.filter(table[name].fill_null(False))
    examples = sorted(hit["clip_id"].to_pylist())[:3]
    return RuleCount(stamp, len(hit), len(table) - table[name].null_count, examples)
