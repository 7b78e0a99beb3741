"""make_plan: sources x states of a store -> what an ingest has to do, as a pure function.

Knows nothing of files, Ray or decoding. Invariant: every clip of either table is counted exactly
once, and a second plan over a store that followed the first one is empty.
"""

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import IngestConfig
from pipeline.errors import MassRemoval
from pipeline.ingest.limits import OutOfReach
from pipeline.reasons import PASSING, Reason
from pipeline.store.schema import CLIPS_SCHEMA

STATE_COLUMNS = [
    "clip_id", "uri", "start_s", "end_s", "label", "split", "status", "reason", "attempts",
    "fp_kind", "fp", "size", "mtime_ns", "group", "more_labels", "spec_hash",
]  # fmt: skip
"""Columns of the clips table a plan needs."""

_PASSING_ATTEMPTS = 2

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """What an ingest would do, and why."""

    todo: pa.Table
    """Clips to decode: SOURCE_SCHEMA, `why` (new, changed, spec_changed, retried) and `attempts`
    so far."""
    missing: pa.Table
    """Listed clips whose file is not there, where the store does not say so yet (SOURCE_SCHEMA)."""
    restated: pa.Table
    """Clips whose labels, split, group or place changed, but not their content (SOURCE_SCHEMA)."""
    removed_ids: list[str]
    """Clips of the store that are not listed any more."""
    counts: dict[str, int] = field(default_factory=dict)
    """new, changed, spec_changed, removed, missing (newly listed, without a file), unchanged,
    retried, and set_aside (of the store, could not be looked at): each clip in exactly one."""
    puts_in_force: bool = False
    """Another spec is in force in the store, or none explicitly: it will be this one at the end."""
    out_of_reach: OutOfReach | None = None
    """Why another spec does not come into force, if clips would go with it."""
    timelines: dict[str, Any] | None = None
    """What probe_timelines found, if it was asked."""

    @property
    def is_empty(self) -> bool:
        """Nothing to decode and nothing to write down."""
        rows = len(self.todo) or len(self.missing) or len(self.restated) or self.removed_ids
        return not (rows or self.puts_in_force)


def content_known(sources: pa.Table, states: pa.Table) -> pa.Table:
    """Clips whose file looks like another one now and whose content the store knows by its hash:
    clip_id, uri, size, known_hash (SHA-256). Args: as make_plan."""
    at = pc.index_in(sources["clip_id"], value_set=states["clip_id"].combine_chunks())
    known = sources.filter(pc.is_valid(at))
    before = states.take(at.drop_null())
    younger = _true(pc.equal(before["fp_kind"], "sha256")) & ~_same_file(known, before)
    known = known.append_column("known_hash", before["fp"])
    return known.filter(pa.array(younger)).select(["clip_id", "uri", "size", "known_hash"])


def make_plan(
    sources: pa.Table,
    states: pa.Table,
    spec_hash: str,
    config: IngestConfig,
    *,
    same_content: Set[str] = frozenset(),
    listed: pa.Table | None = None,
) -> Plan:
    """Compare what there is with what the store knows.

    Args: sources: SOURCE_SCHEMA, unique clip_id; states: STATE_COLUMNS, unique clip_id, as they are
        under the spec; same_content: clips of `content_known` whose file has that content;
        listed: the sources and the clips that `leave_out` took from them; None: it took none.
    Raises: MassRemoval if more of the store vanished than the config allows.
    """
    at = pc.index_in(sources["clip_id"], value_set=states["clip_id"].combine_chunks())
    position = at.combine_chunks().fill_null(-1).to_numpy()
    is_known = position >= 0
    before = states.take(np.maximum(position, 0)) if len(states) else None
    same = pa.array(sorted(same_content), pa.string())
    touched = _true(pc.is_in(sources["clip_id"], value_set=same))
    kinds = _classify(_compared(sources, before, is_known, touched, spec_hash), config)

    unlisted = np.ones(len(states), bool)
    unlisted[position[is_known]] = False
    ids = (sources if listed is None else listed)["clip_id"].combine_chunks()
    by_rule = unlisted & _true(pc.is_in(states["clip_id"], value_set=ids))
    # Clips that were missing before are neither removed by this run nor present.
    present = ~_true(pc.equal(states["reason"], Reason.MISSING))
    n_gone = int(kinds.gone.sum() + (unlisted & ~by_rule & present).sum())
    _refuse_mass_removal(n_gone, int((by_rule & present).sum()), int(present.sum()), config)

    return Plan(
        todo=_todo(sources, before, kinds),
        missing=sources.filter(pa.array(kinds.gone | kinds.missing)),
        restated=sources.filter(pa.array(kinds.reworded | kinds.moved)),
        removed_ids=states["clip_id"].filter(pa.array(unlisted)).to_pylist(),
        counts=kinds.counts(n_unlisted=int(unlisted.sum())),
    )


@dataclass(frozen=True)
class _Compared:
    """Masks over the source clips: what each is, and where it differs from its row in the store."""

    is_known: Mask
    has_file: Mask
    was_missing: Mask
    was_failed: Mask
    touched: Mask
    """The file is another one, of the content the store knows."""
    same_file: Mask
    same_spec: Mask
    same_words: Mask
    same_place: Mask
    reason: pa.ChunkedArray
    attempts: NDArray[np.integer]
    size: NDArray[np.integer]
    """Bytes of the file, 0 where there is none."""


@dataclass(frozen=True)
class _Kinds:
    """Masks over the source clips."""

    # Exactly one of these seven holds for each clip.
    new: Mask
    missing: Mask
    gone: Mask
    changed: Mask
    spec_changed: Mask
    retried: Mask
    kept: Mask
    # Parts of `kept`.
    reworded: Mask
    moved: Mask

    def counts(self, n_unlisted: int) -> dict[str, int]:
        """As in Plan; a clip with other words counts as changed, though nothing is decoded."""
        return {
            "new": int(self.new.sum()),
            "changed": int(self.changed.sum() + self.reworded.sum()),
            "spec_changed": int(self.spec_changed.sum()),
            "removed": int(self.gone.sum()) + n_unlisted,
            "missing": int(self.missing.sum()),
            "unchanged": int(self.kept.sum() - self.reworded.sum()),
            "retried": int(self.retried.sum()),
            "set_aside": 0,
        }


def _todo(sources: pa.Table, before: pa.Table | None, kinds: _Kinds) -> pa.Table:
    """As in Plan. Only a retried clip has its attempts counted on."""
    why = np.select(
        [kinds.new, kinds.changed, kinds.spec_changed, kinds.retried],
        ["new", "changed", "spec_changed", "retried"],
        "",
    )
    todo = np.flatnonzero(why != "")
    attempts = np.zeros(len(sources), np.int32)
    if before is not None:
        attempts = np.where(kinds.retried, before["attempts"].fill_null(0).to_numpy(), 0)
    return (
        sources.take(todo)
        .append_column("why", pa.array(why[todo].tolist(), pa.string()))
        .append_column("attempts", pa.array(attempts[todo], pa.int32()))
    )


def _compared(
    sources: pa.Table,
    before: pa.Table | None,
    is_known: Mask,
    touched: Mask,
    spec_hash: str,
) -> _Compared:
    """Args: before: the row of each clip in the store, any where it is not known."""
    if before is None:
        # Against an empty store every clip is compared with nothing.
        before = pa.table(
            {name: pa.nulls(len(sources), CLIPS_SCHEMA.field(name).type) for name in STATE_COLUMNS}
        )
    reason = before["reason"].fill_null("")
    return _Compared(
        is_known=is_known,
        has_file=pc.is_valid(sources["fp"]).to_numpy(),
        was_missing=is_known & _true(pc.equal(reason, Reason.MISSING)),
        was_failed=is_known & _true(pc.equal(before["status"], "failed")),
        touched=touched,
        same_file=_same_file(sources, before) | (touched & _same_window(sources, before)),
        same_spec=_true(pc.equal(before["spec_hash"], spec_hash)),
        same_words=_same(sources, before, "label")
        & _same(sources, before, "more_labels")
        & _same(sources, before, "split"),
        same_place=_same(sources, before, "uri") & _same(sources, before, "group"),
        reason=reason,
        attempts=before["attempts"].fill_null(0).to_numpy(),
        size=sources["size"].fill_null(0).to_numpy(),
    )


def _classify(clips: _Compared, config: IngestConfig) -> _Kinds:
    """What became of each source clip."""
    new = clips.has_file & (~clips.is_known | clips.was_missing)
    missing = ~clips.has_file & ~clips.is_known
    gone = clips.is_known & ~clips.was_missing & ~clips.has_file
    rest = clips.is_known & ~new & ~gone
    decoded = rest & ~clips.was_missing
    changed = decoded & ~clips.same_file
    spec_changed = decoded & clips.same_file & ~clips.same_spec
    retry = clips.was_failed & _to_retry(clips, config)
    retried = decoded & clips.same_file & clips.same_spec & retry
    kept = rest & ~changed & ~spec_changed & ~retried
    reworded = kept & ~clips.same_words
    moved = kept & clips.same_words & (clips.touched | ~clips.same_place)
    return _Kinds(
        new=new,
        missing=missing,
        gone=gone,
        changed=changed,
        spec_changed=spec_changed,
        retried=retried,
        kept=kept,
        reworded=reworded,
        moved=moved,
    )


def _true(mask: pa.ChunkedArray) -> Mask:
    return np.asarray(mask.fill_null(False).to_numpy(), bool)


def _same(left: pa.Table, right: pa.Table, name: str) -> Mask:
    """Equal, two nulls being equal."""
    both_null = pc.and_(pc.is_null(left[name]), pc.is_null(right[name]))
    return _true(pc.equal(left[name], right[name])) | _true(both_null)


def _same_file(sources: pa.Table, before: pa.Table) -> Mask:
    # A content hash is compared by whoever can read the file; here the stat speaks for it.
    hashed = _true(pc.equal(before["fp_kind"], "sha256"))
    same = (_same(sources, before, "fp") | hashed) & _same(sources, before, "size")
    return same & _same(sources, before, "mtime_ns") & _same_window(sources, before)


def _same_window(sources: pa.Table, before: pa.Table) -> Mask:
    return _same(sources, before, "start_s") & _same(sources, before, "end_s")


def _to_retry(clips: _Compared, config: IngestConfig) -> Mask:
    reason = clips.reason
    passing = _true(pc.is_in(reason, value_set=pa.array([r.value for r in PASSING])))
    wanted = _true(pc.is_in(reason, value_set=pa.array(config.retry_reasons, pa.string())))
    # The limit was raised, or it is another machine's.
    fits = _true(pc.equal(reason, Reason.TOO_LARGE)) & (clips.size <= config.max_clip_bytes)
    return config.retry_failed | wanted | fits | (passing & (clips.attempts < _PASSING_ATTEMPTS))


def _refuse_mass_removal(
    n_gone: int, n_left_out: int, n_present: int, config: IngestConfig
) -> None:
    most = config.max_removed_frac * n_present
    if n_gone + n_left_out <= most:
        return
    if n_gone > most:
        raise MassRemoval(
            f"{n_gone} of the {n_present} clips in the store are not in the source any more, more "
            f"than {config.max_removed_frac:.0%}. Is the folder mounted and the list complete? Use "
            "--allow-mass-delete if they are meant to go. Nothing was changed."
        )
    others = f", and {n_gone} are not in the source any more" if n_gone else ""
    raise MassRemoval(
        f"{n_left_out} of the {n_present} clips in the store are left out by --ingest.leave-out "
        f"{' '.join(config.leave_out)}{others}: together more than {config.max_removed_frac:.0%}. "
        '"diccae store quality" says how many each rule takes. Use --allow-mass-delete if they are '
        "meant to go. Nothing was changed."
    )
