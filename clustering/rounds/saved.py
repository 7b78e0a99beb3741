"""SavedBank: a saved state of the bank: a manifest of the files that hold its rows.

Knows nothing of actors. Invariant: a file that a saved state or a living bank names is not removed;
each was written once, so naming it again costs nothing and a state stays what it was.

bank-00000500/manifest.json names, from the folder of the rounds: bank/*/*/*.parquet (pushed rows),
round-0003/vectors/*.parquet (rows of a freeze); so a run folder can be moved.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from clustering import storage
from clustering.errors import ClusteringError
from clustering.kmeans.hashing import vshard_of
from clustering.rounds.bank import BankRows
from clustering.rounds.frozen import EVERYTHING, Owner, read_rows
from clustering.rounds.targets import stream_slices

_PREFIX = "bank-"
_MANIFEST = "manifest.json"
POOLS = "bank"
"""Folder, below that of the rounds, of what the banks of each pool write."""
MARKER = "coordinator.json"
"""File of a pool beside its banks' folders, by which a restarted coordinator knows itself."""


class SavedBank(NamedTuple):
    """What a bank is made of at one moment."""

    files: tuple[str, ...]
    """Names from the folder of the rounds; a clip's newest row in them counts."""
    held: int | None = None
    """Step of a freeze that is to come, which wants rows that are not the newest any more."""


def together(parts: list[SavedBank]) -> SavedBank:
    """The banks of a pool as one: they may name the same files, where few banks became more."""
    held = [part.held for part in parts if part.held is not None]
    return SavedBank(
        tuple(sorted({n for part in parts for n in part.files})), min(held, default=None)
    )


def saved_name(step: int) -> str:
    """Name, in the folder of the rounds, of the state that a checkpoint of `step` goes on with."""
    return f"{_PREFIX}{step:08d}"


def home_of(uri: str) -> str:
    """The folder of the rounds that a saved state belongs to."""
    return uri.rstrip("/").rsplit("/", 1)[0]


def name_in(home: str, uri: str) -> str:
    """A file of the run by its name from `home`."""
    return uri.removeprefix(f"{home.rstrip('/')}/")


def write_saved(uri: str, saved: SavedBank) -> None:
    """Complete a saved state. Raises: ClusteringError if no later `kept_files` would find it."""
    if not uri.rstrip("/").rsplit("/", 1)[-1].startswith(_PREFIX):
        raise ClusteringError(
            f"{uri}: a saved bank is a folder {_PREFIX}* in the folder of the rounds: by that name "
            "its files are kept"
        )
    storage.write_json(storage.join(uri, _MANIFEST), saved._asdict())


def read_saved(uri: str) -> SavedBank:
    """A saved state. Raises: ClusteringError if nothing was saved there."""
    try:
        found = storage.read_json(storage.join(uri, _MANIFEST))
    except FileNotFoundError:
        raise ClusteringError(
            f"{uri}: no saved bank ({_MANIFEST}). Restore from a checkpoint that was saved."
        ) from None
    return SavedBank(tuple(found["files"]), found["held"])


def kept_files(home: str) -> set[str]:
    """All files that saved states name."""
    return {name for uri in _saved_at(home) for name in read_saved(uri).files}


def forget_saved(home: str, keep: int) -> None:
    """Remove all but the newest `keep` saved states; their files are nobody's then."""
    for uri in _saved_at(home)[:-keep]:
        _remove(uri)


def forget_later(home: str, step: int) -> None:
    """Remove the saved states of steps after `step`."""
    for uri in _saved_at(home):
        if uri > storage.join(home, saved_name(step)):
            _remove(uri)


def _remove(uri: str) -> None:
    # The manifest first: without it a state that is half removed names nothing.
    storage.remove(storage.join(uri, _MANIFEST))
    storage.remove(uri)


def remove_unnamed(home: str, kept: Collection[str], pools: Collection[str]) -> None:
    """Remove what the banks of pools that have ended wrote, but for the files in `kept`."""
    for pool in pools:
        folder = storage.join(home, POOLS, pool)
        if not any(name.startswith(f"{POOLS}/{pool}/") for name in kept):
            storage.remove(folder)
            continue
        for bank in storage.names(folder):
            files = [] if bank == MARKER else storage.names(storage.join(folder, bank))
            for name in files:
                if f"{POOLS}/{pool}/{bank}/{name}" not in kept:
                    storage.remove(storage.join(folder, bank, name))


def pools_at(home: str) -> list[str]:
    """Names of the pools that have written rows."""
    return storage.names(storage.join(home, POOLS))


def saved_rows(uri: str, streams: Mapping[str, int], owner: Owner = EVERYTHING) -> BankRows:
    """The rows of `owner` in a saved state: the slices named in `streams`.

    A clip may come more than once; its newest row counts.
    Raises: ClusteringError if nothing was saved, or rows without such a slice.
    """
    parts = [BankRows.empty(sum(streams.values()))]
    for name in read_saved(uri).files:
        parts.extend(owned_rows(storage.join(home_of(uri), name), streams, owner))
    return BankRows.concat(parts)


def owned_rows(uri: str, streams: Mapping[str, int], owner: Owner) -> Iterator[BankRows]:
    """Yield the rows of `owner` in one file. Raises: ClusteringError, as `saved_rows`."""
    with storage.opened(uri) as handle:
        metadata = pq.read_schema(handle).metadata
    saved = json.loads(metadata[b"streams"])
    if any(saved.get(name) != width for name, width in streams.items()):
        raise ClusteringError(
            f"{uri}: saved rows hold {saved}, the bank {dict(streams)}. Restore from a checkpoint "
            "of a run with these streams."
        )
    slices = stream_slices(saved)
    columns = np.concatenate([np.arange(*slices[name]) for name in streams])
    for rows in read_rows(uri, sum(saved.values()), owner.groups_of(metadata)):
        mine = rows.take(np.flatnonzero(owner.owns(vshard_of(rows.keys, owner.vshards))))
        yield mine if list(saved) == list(streams) else mine._replace(rows=mine.rows[:, columns])


def _saved_at(home: str) -> list[str]:
    """Saved states, oldest first: their names end in the step."""
    names = [name for name in storage.names(home) if name.startswith(_PREFIX)]
    uris = [storage.join(home, name) for name in names]
    return [uri for uri in uris if storage.exists(storage.join(uri, _MANIFEST))]
