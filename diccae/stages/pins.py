"""let_go_of_gone: the pins of a store whose runs are no more.

Knows nothing of what a run computes. Invariant: a run that cannot be looked at is there: a disk
that is not mounted, a bucket that does not answer, a folder of another machine keep their pins.
"""

import platform
from typing import Any, NamedTuple

from pipeline.storage import Location
from pipeline.store.store import FeatureStore


class LetGo(NamedTuple):
    """What became of the pins of runs."""

    gone: list[str]
    """Names that were let go of: the place of the run is there, the run is not."""
    unknown: dict[str, str]
    """Name of a pin that stays, and why nobody can say whether its run is there."""


def let_go_of_gone(uri: str, dry_run: bool = False) -> LetGo:
    """Let go of each pin whose run folder no longer has a run.json.

    Raises: StoreError; whatever storage of a run raises that does not answer.
    """
    store = FeatureStore.open(uri)
    gone, unknown = [], {}
    for name, about in sorted(store.pins_in_full().items()):
        if not about.get("run"):
            continue  # Made by hand, or before pins named their run.
        why = _why_unknown(about, store.location.is_local)
        if why is None and not Location(about["run"]).exists("run.json"):
            gone.append(name)
            if not dry_run:
                store.unpin(name)
        elif why is not None:
            unknown[name] = why
    return LetGo(gone, unknown)


def _why_unknown(about: dict[str, Any], is_local_store: bool) -> str | None:
    """Why the run of a pin cannot be looked at from here; None if it can."""
    place = Location(about["run"])
    if place.exists("run.json"):
        return None
    machine = about.get("machine")
    if place.is_local and machine != platform.node() and (machine or not is_local_store):
        return f"{about['run']} is a folder of {machine or 'another machine, perhaps'}"
    parent = Location(place.uri.rpartition("/")[0] or "/")
    # An empty folder is also what stands where a disk is not mounted.
    if not parent.entries():
        return f"{parent.uri} is empty or not there: it may not be mounted"
    return None
