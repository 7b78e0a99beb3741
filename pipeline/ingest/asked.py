"""Asked: what an ingest was asked to bring into a store, and the plan that comes of it.

Lists the source and reads the store; decodes and commits nothing. Invariant: equal answers for
`--plan` and for the run, which both ask here.
"""

import logging
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.decode.choice import spec_for_this_machine
from pipeline.ingest.content import same_content
from pipeline.ingest.limits import OutOfReach
from pipeline.ingest.plan import STATE_COLUMNS, Plan, make_plan
from pipeline.quality.leave_out import without_left_out
from pipeline.source.listing import Listing, list_sources
from pipeline.storage import Location
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.store import Snapshot

_LOG = logging.getLogger(__name__)
_NO_STATES = CLIPS_SCHEMA.empty_table().select(STATE_COLUMNS)


@dataclass(frozen=True)
class Asked:
    """What an ingest was asked to bring into a store."""

    clips: str | None
    videos: str | None
    store: str
    spec: FeatureSpec | None
    config: IngestConfig
    label_from_folder: bool

    def here(self, known: Snapshot | None) -> "Asked":
        """The same with a spec that this machine can decode. Raises: StoreError."""
        return replace(self, spec=spec_for_this_machine(self.spec, known.spec if known else None))

    def spec_on(self, snapshot: Snapshot | None) -> FeatureSpec:
        """What is to be decoded for on top of a version, None for a store yet to be made."""
        return self.spec or (snapshot.spec if snapshot else FeatureSpec())

    def plan(self, snapshot: Snapshot | None, cache: Location | None) -> Plan:
        """What brings a version of a store up to date.

        Args: cache: as list_sources takes it; the index of tar parts is kept there from the first
            look on, even if the store is yet to be made.
        """
        listing = list_sources(
            self.clips, self.videos, cache, label_from_folder=self.label_from_folder
        )
        spec = self.spec_on(snapshot)
        states = snapshot.states(STATE_COLUMNS, spec.spec_hash()) if snapshot else _NO_STATES
        sources, known = listing.without_unreadable(states)
        if self.config.leave_out:
            # Refused for a store that is yet to be made: nothing in it was looked at.
            sources = without_left_out(Location(self.store), sources, self.config.leave_out)
        by_content = self.config.fingerprint == "sha256"
        plan = make_plan(
            sources, known, spec.spec_hash(), self.config, listed=listing.clips,
            same_content=same_content(sources, known) if by_content else set(),
        )  # fmt: skip
        _warn_of_lost_labels(plan, known)
        _warn_of_long_windows(plan, spec)
        if snapshot is not None and not has_in_force(snapshot, spec):
            lost = _out_of_reach(listing, states, known, snapshot, spec)
            plan = replace(plan, puts_in_force=lost is None, out_of_reach=lost)
        plan.counts["set_aside"] = len(states) - len(known)
        return plan


def _warn_of_lost_labels(plan: Plan, states: pa.Table) -> None:
    """A forgotten --label-from-folder, or list, would empty the classes of a store silently."""
    labelled = states["clip_id"].filter(pc.is_valid(states["label"])).combine_chunks()
    columns = ["clip_id", "label"]
    written = pa.concat_tables([plan.todo.select(columns), plan.restated.select(columns)])
    without = written["clip_id"].filter(pc.is_null(written["label"]))
    if n_lost := pc.sum(pc.is_in(without, value_set=labelled)).as_py():
        _LOG.warning(
            "%d clips lose the label they have in the store: the source names none. Labels come "
            "from --clips, or from folders with --label-from-folder",
            n_lost,
        )


def _warn_of_long_windows(plan: Plan, spec: FeatureSpec) -> None:
    """Of a window that somebody drew by hand, the end would be missing silently. A clip's file may
    be longer than its features: that is how VGGSound's are cut."""
    starts = pc.fill_null(plan.todo["start_s"], 0.0)
    lengths_s = pc.subtract(plan.todo["end_s"], starts)
    # Ends are written with few digits: 0.1 + 2 is not 2.1.
    if n_long := pc.sum(pc.greater(lengths_s, spec.duration_s + 1e-3)).as_py():
        _LOG.warning(
            "%d windows of the list are longer than features.duration_s = %g s (up to %g s): the "
            "rest is not used. List such a one as several, or give --features.duration_s",
            n_long, spec.duration_s, pc.max(lengths_s).as_py(),
        )  # fmt: skip


def has_in_force(snapshot: Snapshot, spec: FeatureSpec) -> bool:
    """Whether a version names this spec as the one in force."""
    return snapshot.names_its_spec and snapshot.spec_hash == spec.spec_hash()


def _out_of_reach(
    listing: Listing, states: pa.Table, known: pa.Table, snapshot: Snapshot, spec: FeatureSpec
) -> OutOfReach | None:
    """The clips in force that a spec would come into force without, if there are any.

    Args: states: of the clips under the spec; known: those that could be looked at.
    """
    is_known = pc.is_in(states["clip_id"], value_set=known["clip_id"].combine_chunks())
    is_of_spec = pc.equal(states["spec_hash"], spec.spec_hash()).fill_null(False)
    undecoded = states.filter(pc.invert(pc.or_(is_known, is_of_spec)))
    if not len(undecoded):
        return None
    live = snapshot.rows(None)["clip_id"].combine_chunks()
    lost = undecoded.filter(pc.is_in(undecoded["clip_id"], value_set=live))
    uris = lost["uri"].to_pylist()
    return OutOfReach(len(lost), listing.unreadable_above(uris)) if uris else None
