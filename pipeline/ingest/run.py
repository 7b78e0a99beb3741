"""An ingest: plan, decode over Ray Data, commit.

The driver: knows nothing of containers or codecs. Invariant: clips rows are committed only for
shards that are written whole, so that killing any process at any time loses at most the work not
yet committed, and nothing is ever there twice.
"""

import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.errors import TooManyFailures
from pipeline.ingest.plan import STATE_COLUMNS, Plan, make_plan
from pipeline.quality.leave_out import without_left_out
from pipeline.quality.rules import rules_named
from pipeline.reasons import Reason
from pipeline.source.clip_list import read_entries
from pipeline.source.fetch import is_local_file
from pipeline.source.listing import list_sources, sha256_of
from pipeline.store.lease import Lease
from pipeline.store.schema import CLIPS_SCHEMA, SOURCE_SCHEMA
from pipeline.store.shards import discard_unfinished
from pipeline.store.store import FeatureStore


@dataclass(frozen=True)
class IngestSummary:
    """What an ingest did."""

    new: int
    changed: int
    spec_changed: int
    removed: int
    unchanged: int
    retried: int
    ok: int
    failed: int
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
    clips: str, videos: str | None, store: str, spec: FeatureSpec | None, config: IngestConfig
) -> Plan:
    """What `ingest` would do; starts nothing and changes nothing.

    Raises: SourceError, StoreError, MassRemoval.
    """
    cache = None
    states = _NO_STATES
    if FeatureStore.exists(store):
        existing = FeatureStore.open(store)
        cache, snapshot = existing.location, existing.snapshot()
        states = snapshot.states(STATE_COLUMNS)
        spec = spec or snapshot.spec
    spec = spec or FeatureSpec()
    sources = list_sources(clips, videos, cache)
    if config.leave_out and cache is not None:
        sources = without_left_out(cache, sources, config.leave_out)
    plan = make_plan(sources, states, spec.spec_hash(), config)
    if config.fingerprint == "sha256":
        plan = _without_touched(plan)
    if config.probe:
        from pipeline.ingest.probe import probe_timelines

        plan = replace(plan, timelines=probe_timelines(plan.todo, spec, config))
    return plan


def _without_touched(plan: Plan) -> Plan:
    """Move clips whose file is only younger, with the same content, from todo to restated."""
    touched = np.array(
        [
            clip["why"] == "changed"
            and clip["known_hash"] is not None
            and is_local_file(clip["uri"])
            and clip["known_hash"] == sha256_of(clip["uri"])
            for clip in plan.todo.select(["why", "known_hash", "uri"]).to_pylist()
        ],
        bool,
    )
    n_touched = int(touched.sum())
    counts = plan.counts | {
        "changed": plan.counts["changed"] - n_touched,
        "unchanged": plan.counts["unchanged"] + n_touched,
    }
    younger = plan.todo.filter(pa.array(touched)).select(SOURCE_SCHEMA.names)
    return replace(
        plan,
        todo=plan.todo.filter(pa.array(~touched)),
        restated=pa.concat_tables([plan.restated, younger]),
        counts=counts,
    )


def ingest(
    clips: str,
    videos: str | None,
    store: str,
    spec: FeatureSpec | None,
    config: IngestConfig,
    *,
    start_ray: Callable[[], None],
    on_progress: Callable[[Progress], None],
) -> IngestSummary:
    """Bring a store up to date with its source.

    Args: spec: None takes the store's own, or FeatureSpec() for a new store; start_ray: called only
        if there is something to decode.
    Raises: SourceError, MassRemoval, StoreError, StoreLocked, TooManyFailures (all good clips are
        committed), KeyboardInterrupt (what is done is committed).
    """
    started = time.monotonic()
    if not FeatureStore.exists(store):
        read_entries(clips)  # A mistake in the list should not leave an empty store behind.
    target = FeatureStore.create(store, spec or FeatureSpec())
    planned = target.version()
    plan = plan_ingest(clips, videos, store, spec, config)
    spec = spec or target.snapshot().spec
    if plan.is_empty:
        seconds = round(time.monotonic() - started, 3)
        return IngestSummary(
            **plan.counts, ok=0, failed=0, seconds=seconds, version=target.version()
        )
    with Lease(target.location, config.lease_stale_s, f"an ingest of {clips}") as lease:
        if target.version() != planned:  # Another run finished before this one had the lease.
            plan = plan_ingest(clips, videos, store, spec, config)
        run = _Run(target, spec, config, lease, len(plan.todo), on_progress)
        target.write_spec(spec)
        run.settle(plan)
        if len(plan.todo):
            start_ray()
            run.decode(plan.todo)
    summary = IngestSummary(
        **plan.counts,
        ok=run.n_ok,
        failed=run.by_reason.total(),
        seconds=round(time.monotonic() - started, 3),
        version=target.version(),
    )
    run.refuse_too_many_failures(summary)
    return summary


@dataclass
class _Run:
    """The state of one ingest on the driver."""

    store: FeatureStore
    spec: FeatureSpec
    config: IngestConfig
    lease: Lease
    n_todo: int
    on_progress: Callable[[Progress], None]
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    n_ok: int = 0
    n_done: int = 0
    n_committed: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)
    _first_decoded: datetime | None = None
    _waiting: list[pa.Table] = field(default_factory=list)
    _last_commit: float = field(default_factory=time.monotonic)

    def settle(self, plan: Plan) -> None:
        """Commit what needs no decoding: missing, restated and removed clips."""
        tables = []
        if len(plan.missing):
            self.by_reason[Reason.MISSING] += len(plan.missing)
            tables.append(
                self._rows(plan.missing, "failed", Reason.MISSING, "no file is there for the clip")
            )
        if len(plan.restated) or plan.removed_ids:
            states = self.store.snapshot().clips
            tables.append(_restate(states, plan.restated, self.spec.spec_hash()))
            gone = pc.is_in(states["clip_id"], value_set=pa.array(plan.removed_ids, pa.string()))
            removed = states.filter(gone).select(SOURCE_SCHEMA.names)
            tables.append(self._rows(removed, "removed", None, None))
        if tables:
            self.lease.check()
            about = {"run_id": self.run_id}
            if self.config.leave_out:
                about["left_out"] = " ".join(r.stamp for r in rules_named(self.config.leave_out))
            self.store.append(pa.concat_tables(tables), about)

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
        from pipeline.ingest.on_ray import run_shards

        discard_unfinished(self.store.location)
        try:
            for states in run_shards(self.store.uri, todo, self.spec, self.config, self.run_id):
                self._take(states)
                self._report()
        finally:
            self._commit()
            discard_unfinished(self.store.location)
        self._report()

    def _take(self, states: pa.Table) -> None:
        self._waiting.append(states)
        if self._first_decoded is None:
            self._first_decoded = pc.min(states["decoded_at"]).as_py()
        failed = states.filter(pc.equal(states["status"], "failed"))
        self.by_reason.update(failed["reason"].to_pylist())
        self.n_ok += len(states) - len(failed)
        self.n_done += len(states)
        is_late = time.monotonic() - self._last_commit > self.config.commit_seconds
        if len(self._waiting) >= self.config.commit_shards or is_late:
            self._commit()

    def _commit(self) -> None:
        if self._waiting:
            rows = pa.concat_tables(self._waiting)
            self.lease.check()
            self.store.append(rows, {"run_id": self.run_id})
            self.n_committed += len(rows)
            self._waiting = []
        self._last_commit = time.monotonic()

    def _report(self) -> None:
        # From the first clip on: the start of Ray and of the actors says nothing of the pace.
        since = self._first_decoded or datetime.now(UTC)
        rate = self.n_done / max((datetime.now(UTC) - since).total_seconds(), 1e-3)
        left = (self.n_todo - self.n_done) / rate if rate else None
        self.on_progress(
            Progress(
                self.n_todo,
                self.n_done,
                self.n_ok,
                self.n_done - self.n_ok,
                dict(self.by_reason),
                rate,
                left,
                self.n_committed,
            )
        )

    def refuse_too_many_failures(self, summary: IngestSummary) -> None:
        """Raises: TooManyFailures."""
        n_failed = self.n_done - self.n_ok
        if n_failed <= self.config.max_failed_frac * self.n_done:
            return
        reasons = ", ".join(f"{name} {n}" for name, n in self.by_reason.most_common())
        raise TooManyFailures(
            f"{n_failed} of {self.n_done} clips failed ({reasons}), more than "
            f"{self.config.max_failed_frac:.0%}. The {self.n_ok} good ones are committed. See "
            f'"diccae store failures --store {self.store.uri}".',
            summary.to_json(),
        )


_NO_STATES = CLIPS_SCHEMA.empty_table().select(STATE_COLUMNS)


def _restate(states: pa.Table, restated: pa.Table, spec_hash: str) -> pa.Table:
    """Rows of the clips table with the label, split, place and stat the source gives now.

    They are of this spec already, but for clips that were missing under another one.
    """
    position = pc.index_in(restated["clip_id"], value_set=states["clip_id"].combine_chunks())
    rows = states.take(position)
    for name in ("label", "split", "uri", "size", "mtime_ns"):
        index = CLIPS_SCHEMA.get_field_index(name)
        rows = rows.set_column(index, CLIPS_SCHEMA.field(index), restated[name])
    index = CLIPS_SCHEMA.get_field_index("spec_hash")
    return rows.set_column(
        index, CLIPS_SCHEMA.field(index), pa.array([spec_hash] * len(rows), pa.string())
    )
