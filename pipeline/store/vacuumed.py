"""whole_snapshot: a version of a store, or a word that vacuum took files of it and which are whole.

Knows nothing of what is read from it. Invariant: what the newest version needs too and is not there
was not vacuumed, but is damage, of which `store verify` speaks; nothing is said of it here.
"""

import contextlib
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import pyarrow.compute as pc

from pipeline.errors import StoreError
from pipeline.store.store import FeatureStore, Snapshot

_MOST_LOOKED_AT = 20
"""Versions before the newest one that are looked at for whole ones."""


class Files(NamedTuple):
    """Names of files, of the log and of features."""

    log: set[str]
    shards: set[str]

    @classmethod
    def there(cls, store: FeatureStore) -> "Files":
        """All that a store has."""
        shards = {f"features/{name}" for name in store.location.files("features")}
        return cls(set(store.location.files("clips")), shards)

    @classmethod
    def needed(cls, snapshot: Snapshot, there: "Files") -> "Files":
        """By the data set of a version; no shards if its log cannot be read."""
        if not snapshot.log_files <= there.log:
            return cls(snapshot.log_files, set())
        shards = pc.unique(snapshot.rows(None)["shard"]).to_pylist()
        return cls(snapshot.log_files, set(shards))

    def are_in(self, there: "Files") -> bool:
        """Whether none of these is missing there."""
        return self.log <= there.log and self.shards <= there.shards


def whole_snapshot(store: FeatureStore, version: int | None) -> Snapshot:
    """A version whose files are there, None for the newest.

    Raises: StoreError if the version does not exist or was vacuumed.
    """
    snapshot = store.snapshot(version)
    if version is None:
        return snapshot
    there = Files.there(store)
    needed = Files.needed(snapshot, there)
    log, shards = needed.log - there.log, needed.shards - there.shards
    if log or shards:
        newest = store.snapshot()
        still = Files.needed(newest, there)
        if newest.version != snapshot.version and (log - still.log or shards - still.shards):
            n_gone, of = (len(log), "log files") if log else (len(shards), "shards")
            n_all = len(needed.log if log else needed.shards)
            raise StoreError(
                f"{store.uri}: version {version} was vacuumed: {n_gone} of its {n_all} {of} are "
                f"gone. Whole are {_told(_whole_versions(store, newest, there))}: name one of "
                f"them, or none for {newest.version}, the newest; runs pin the version they read."
            )
    return snapshot


def _whole_versions(store: FeatureStore, newest: Snapshot, there: Files) -> list[int]:
    """The newest, those before it up to the first that is not whole, and pinned ones."""

    def is_whole(version: int) -> bool:
        with contextlib.suppress(StoreError):
            return Files.needed(store.snapshot(version), there).are_in(there)
        return False

    before = range(newest.version - 1, max(newest.version - 1 - _MOST_LOOKED_AT, -1), -1)
    young = {newest.version, *itertools.takewhile(is_whole, before)}
    return sorted(young | set(filter(is_whole, set(store.pins().values()) - young)))


def _told(versions: Iterable[int]) -> str:
    """Versions with neighbours put together: 1, 4 to 6."""
    told = []
    for _, run in itertools.groupby(enumerate(versions), lambda one: one[1] - one[0]):
        first, *rest = [version for _, version in run]
        told.append(f"{first} to {rest[-1]}" if rest else str(first))
    return ", ".join(told)
