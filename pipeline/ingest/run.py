"""ingest: the driver of a run, which plans, has clips decoded and commits what comes back.

Knows nothing of containers or codecs. Invariant: clips rows are committed only for shards that are
written whole, so that killing any process at any time loses at most the work not yet committed, and
nothing is ever there twice; another spec comes into force when all of its clips were decoded, and
not if too many of them failed, or if clips that could not be looked at would go with it. That a
clip vanished is believed at the end, if few others did.
"""

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.ingest.asked import Asked, has_in_force
from pipeline.ingest.limits import (
    FAILURE_COLUMNS,
    Failures,
    refuse_failures,
    refuse_out_of_reach,
    refuse_vanished,
)
from pipeline.ingest.plan import Plan
from pipeline.quality.rules import rules_named
from pipeline.reasons import Reason
from pipeline.storage import Location
from pipeline.store.lease import Lease
from pipeline.store.schema import CLIPS_SCHEMA, SOURCE_SCHEMA
from pipeline.store.shards import discard_unfinished
from pipeline.store.store import FeatureStore, Snapshot

_LOCAL_CLIPS = 64
"""About what two cores decode while a cluster takes up its work."""


@dataclass(frozen=True)
class IngestSummary:
    """What an ingest did: the counts of its plan, then what became of the clips decoded."""

    new: int
    changed: int
    spec_changed: int
    removed: int
    missing: int
    unchanged: int
    retried: int
    set_aside: int
    """Clips of the store that could not be looked at: they stay as they are."""
    ok: int
    failed: int
    """Failed decodes; clips without a file are `missing` or `removed`."""
    seconds: float
    version: int

    def to_json(self) -> dict[str, int | float]:
        """The fields, in order."""
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """How far an ingest is."""

    total: int
    done: int
    ok: int
    failed: int
    by_reason: dict[str, int]
    clips_per_s: float
    """Since the first clip was decoded."""
    eta_s: float | None
    committed: int


def plan_ingest(
    clips: str | None,
    videos: str | None,
    store: str,
    spec: FeatureSpec | None,
    config: IngestConfig,
    *,
    label_from_folder: bool = False,
    probe: bool = False,
) -> Plan:
    """What `ingest` would do; starts nothing and changes nothing.

    Args: probe: read the containers of the clips to do and count unclean timelines.
    Raises: SourceError, StoreError, MassRemoval.
    """
    existing = FeatureStore.open(store) if FeatureStore.exists(store) else None
    known = existing.snapshot() if existing else None
    asked = Asked(clips, videos, store, spec, config, label_from_folder).here(known)
    plan = asked.plan(known, existing.location if existing else None)
    if not probe:
        return plan
    from pipeline.ingest.probe import probe_timelines

    return replace(plan, timelines=probe_timelines(plan.todo, asked.spec_on(known), config))


def ingest(
    clips: str | None,
    videos: str | None,
    store: str,
    spec: FeatureSpec | None,
    config: IngestConfig,
    *,
    start_ray: Callable[[], None],
    on_progress: Callable[[Progress], None],
    label_from_folder: bool = False,
) -> IngestSummary:
    """Bring a store up to date with its source.

    Args: clips, videos, label_from_folder: as list_sources takes them; spec: None: the one in
        force, FeatureSpec() for a new store; start_ray: called above config.local_clips clips.
    Raises: SourceError, MassRemoval, StoreError, StoreLocked; and when all that is good, or done,
        is committed: TooManyFailures, SpecWithheld, KeyboardInterrupt, MassRemoval.
    """
    started = time.monotonic()
    known = FeatureStore.open(store).snapshot() if FeatureStore.exists(store) else None
    asked = Asked(clips, videos, store, spec, config, label_from_folder).here(known)
    # Before the store is made: a mistake in the source should not leave an empty one behind.
    plan = asked.plan(known, Location(store))
    target = FeatureStore.create(store, asked.spec or FeatureSpec())
    newest = known or target.snapshot()
    if known is None and not has_in_force(newest, asked.spec_on(newest)):
        plan = replace(plan, puts_in_force=True)
    if plan.is_empty:
        return _if_whole(plan, _summary(plan, newest.version, started))
    with target.lease(config.lease_stale_s, f"an ingest of {clips or videos}") as lease:
        if target.version() != (known.version if known else 0):
            # Another run finished before this one had the lease.
            newest = target.snapshot()
            plan = asked.plan(newest, Location(store))
        used = asked.spec_on(newest)
        run = _Run(target, used, config, lease, len(plan.todo), on_progress, start_ray)
        run.carry_out(plan, newest)
        summary = _summary(plan, target.version(), started, ok=run.n_ok, failed=run.n_failed)
    run.refuse_too_many_failures(summary)
    return _if_whole(plan, summary)


def _if_whole(plan: Plan, summary: IngestSummary) -> IngestSummary:
    """The summary. Raises: SpecWithheld if the plan could not bring all that was asked for."""
    refuse_out_of_reach(plan.out_of_reach, summary.to_json())
    return summary


def _summary(
    plan: Plan, version: int, started: float, ok: int = 0, failed: int = 0
) -> IngestSummary:
    seconds = round(time.monotonic() - started, 3)
    return IngestSummary(**plan.counts, ok=ok, failed=failed, seconds=seconds, version=version)


@dataclass
class _Run:
    """The state of one ingest on the driver."""

    store: FeatureStore
    spec: FeatureSpec
    config: IngestConfig
    lease: Lease
    n_todo: int
    on_progress: Callable[[Progress], None]
    start_ray: Callable[[], None]
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    n_ok: int = 0
    n_done: int = 0
    n_committed: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)
    """Failed decodes, and files that vanished before theirs."""
    n_first: int = 0
    """Clips decoded for the first time, as they are and under this spec; no vanished ones."""
    first_failures: Counter[str] = field(default_factory=Counter)
    """Of those; a clip that is tried again and fails again is no news."""
    _first_decoded: datetime | None = None
    _withheld: Failures | None = None
    """Why the spec was not put in force."""
    _waiting: list[pa.Table] = field(default_factory=list)
    _vanished: list[pa.Table] = field(default_factory=list)
    """Rows of clips whose file went meanwhile. They end what all specs hold of a clip, so they wait
    until it is known that the folder did not go."""
    _last_commit: float = field(default_factory=time.monotonic)

    def carry_out(self, plan: Plan, planned: Snapshot) -> None:
        """Do what the plan says. Args: planned: the version it was made from."""
        self.settle(plan, planned)
        if len(plan.todo):
            self.decode(plan.todo)
        if plan.puts_in_force:
            # Last: a run that is stopped leaves the data set of the old spec as it was.
            self._put_in_force()

    def _put_in_force(self) -> None:
        newest, spec_hash = self.store.snapshot(), self.spec.spec_hash()
        # Of all runs under this spec: the same again, which finds nothing to do, is no way around.
        failures = Failures.of_spec(newest.states(FAILURE_COLUMNS, spec_hash), spec_hash)
        if failures.are_too_many(self.config) and newest.spec_hash != spec_hash:
            self._withheld = failures
        else:
            self.store.put_in_force(self.spec, {"run_id": self.run_id}, self.lease.check)

    def settle(self, plan: Plan, planned: Snapshot) -> None:
        """Commit what needs no decoding: missing, restated and removed clips.

        Args: planned: the version the plan was made from.
        """
        tables = []
        if len(plan.missing):
            tables.append(
                self._rows(plan.missing, "failed", Reason.MISSING, "no file is there for the clip")
            )
        if len(plan.restated) or plan.removed_ids:
            states = planned.states(CLIPS_SCHEMA.names, self.spec.spec_hash())
            tables.append(_restate(states, plan.restated))
            gone = pc.is_in(states["clip_id"], value_set=pa.array(plan.removed_ids, pa.string()))
            removed = states.filter(gone).select(SOURCE_SCHEMA.names)
            tables.append(self._rows(removed, "removed", None, None))
        if tables:
            about = {"run_id": self.run_id}
            if self.config.leave_out:
                about["left_out"] = " ".join(r.stamp for r in rules_named(self.config.leave_out))
            self.store.append(pa.concat_tables(tables), about, self.lease.check)

    def _rows(
        self, clips: pa.Table, status: str, reason: Reason | None, detail: str | None
    ) -> pa.Table:
        n = len(clips)
        constant = {
            "status": status,
            "reason": reason.value if reason else None,
            "detail": detail,
            "attempts": 0,
            "spec_hash": self.spec.spec_hash(),
            "run_id": self.run_id,
            "decoded_at": datetime.now(UTC),
        }
        columns = [
            clips[name]
            if name in clips.column_names
            else pa.array([constant.get(name)] * n, CLIPS_SCHEMA.field(name).type)
            for name in CLIPS_SCHEMA.names
        ]
        return pa.table(columns, schema=CLIPS_SCHEMA)

    def decode(self, todo: pa.Table) -> None:
        """Decode all clips, committing as shards are finished."""
        self.store.write_spec(self.spec)
        self.lease.check()
        discard_unfinished(self.store.location)
        try:
            for states in self._decoded(todo):
                self._take(states)
                self._report()
                refuse_vanished(self.by_reason[Reason.MISSING], self.n_todo, self.config)
            self._waiting += self._vanished
        finally:
            self._commit()
            # Not all: the lease may be lost, and its new holder be at work.
            discard_unfinished(self.store.location, self.run_id)
        self._report()

    def _decoded(self, todo: pa.Table) -> Iterator[pa.Table]:
        """Rows of the clips table, a finished shard's at a time; each clip of `todo` once."""
        given = self.config.local_clips
        if len(todo) > (_LOCAL_CLIPS if given is None else given):
            from pipeline.ingest.on_ray import run_shards

            self.start_ray()
        else:
            from pipeline.ingest.on_threads import run_shards
        yield from run_shards(self.store.uri, todo, self.spec, self.config, self.run_id)

    @property
    def n_failed(self) -> int:
        """Failed decodes; a file that vanished before its decode is none."""
        return self.by_reason.total() - self.by_reason[Reason.MISSING]

    def _take(self, states: pa.Table) -> None:
        is_gone = pc.equal(states["reason"], Reason.MISSING.value).fill_null(False)
        for rows, place in ((is_gone, self._vanished), (pc.invert(is_gone), self._waiting)):
            if len(some := states.filter(rows)):
                place.append(some)
        if self._first_decoded is None:
            self._first_decoded = pc.min(states["decoded_at"]).as_py()
        failed = states.filter(pc.equal(states["status"], "failed"))
        self.by_reason.update(failed["reason"].to_pylist())
        is_again = pc.greater(states["attempts"], 1).fill_null(False)
        first = states.filter(pc.invert(pc.or_(is_gone, is_again)))
        self.n_first += len(first)
        self.first_failures.update(first["reason"].drop_null().to_pylist())
        self.n_ok += len(states) - len(failed)
        self.n_done += len(states)
        is_late = time.monotonic() - self._last_commit > self.config.commit_seconds
        if len(self._waiting) >= self.config.commit_shards or is_late:
            self._commit()

    def _commit(self) -> None:
        if self._waiting:
            rows = pa.concat_tables(self._waiting)
            self.store.append(rows, {"run_id": self.run_id}, self.lease.check)
            self.n_committed += len(rows)
            self._waiting = []
        self._last_commit = time.monotonic()

    def _report(self) -> None:
        # From the first clip on: the start of Ray and of the actors says nothing of the pace.
        since = self._first_decoded or datetime.now(UTC)
        # Within the first second several decoders have a clip each, and no pace is known.
        rate = self.n_done / max((datetime.now(UTC) - since).total_seconds(), 1.0)
        left = (self.n_todo - self.n_done) / rate if rate else None
        self.on_progress(
            Progress(
                self.n_todo,
                self.n_done,
                self.n_ok,
                self.n_failed,
                dict(self.by_reason),
                rate,
                left,
                self.n_committed,
            )
        )

    def refuse_too_many_failures(self, summary: IngestSummary) -> None:
        """Raises: TooManyFailures."""
        spec_hash = self.spec.spec_hash()
        failures = self._withheld
        if failures is None:
            n_of_spec = 0
            if self.first_failures:
                states = self.store.snapshot().states(FAILURE_COLUMNS, spec_hash)
                n_of_spec = Failures.of_spec(states, spec_hash).n_clips
            failures = Failures.of_run(self.first_failures, self.n_first, n_of_spec)
        withheld = spec_hash if self._withheld else None
        refuse_failures(failures, self.config, self.store.uri, summary.to_json(), withheld=withheld)


def _restate(states: pa.Table, restated: pa.Table) -> pa.Table:
    """Rows of the clips table with the labels, split, group, place and stat the source gives now.

    Everything else stays, above all the spec: it is that of the features the row points at.
    """
    position = pc.index_in(restated["clip_id"], value_set=states["clip_id"].combine_chunks())
    rows = states.take(position)
    for name in ("label", "more_labels", "split", "group", "uri", "size", "mtime_ns"):
        index = CLIPS_SCHEMA.get_field_index(name)
        rows = rows.set_column(index, CLIPS_SCHEMA.field(index), restated[name])
    return rows
