"""versions: what a store was at each commit, when, by what, and who depends on it; and its pins.

Knows nothing of runs but the URI that a pin names. Invariant: looking changes nothing, and a pin is
made of a version that can be read whole.
"""

import re
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import StoreError
from pipeline.store.store import FeatureStore
from pipeline.store.vacuumed import Files, whole_snapshot

_PIN_NAME = re.compile(r"[\w.-]+")


def versions(uri: str, last: int = 20) -> list[dict[str, Any]]:
    """The newest versions of a store, newest first, and older ones that are pinned.

    Args: last: so many, 1 or more.
    Returns: of each {"version", "time" (UTC, ISO), "by" (what made it, with the id of an ingest),
        "clips" (of its data set; None: vacuumed), "spec" (hash of the one in force, None: vacuumed
        with it), "pins" (names)}.
    Raises: StoreError.
    """
    if last < 1:
        raise StoreError(f"{uri}: the last {last} versions; 1 or more are allowed")
    store = FeatureStore.open(uri)
    newest, there = store.version(), Files.there(store)
    pins: dict[int, list[str]] = {}
    for name, version in sorted(store.pins().items()):
        pins.setdefault(version, []).append(name)
    shown = {*range(max(0, newest - last + 1), newest + 1), *(pins.keys() & range(newest + 1))}
    found = []
    for commit in store.history():
        version = int(commit["version"])
        if version in shown:
            time = datetime.fromtimestamp(commit["timestamp"] / 1000, UTC)
            about = {"version": version, "time": time.isoformat(timespec="seconds")}
            about["by"] = _what_made(commit)
            found.append(about | _content(store, version, there) | {"pins": pins.get(version, [])})
    return found


def _content(store: FeatureStore, version: int, there: Files) -> dict[str, Any]:
    snapshot = store.snapshot(version)
    is_whole = Files.needed(snapshot, there).are_in(there)
    # Of the log's files, only where they are there: format 1 leaves the spec to be derived.
    is_told = is_whole or snapshot.names_its_spec
    return {
        "clips": len(snapshot.rows(None)) if is_whole else None,
        "spec": snapshot.spec_hash if is_told else None,
    }


def _what_made(commit: dict[str, Any]) -> str:
    """In words, from what the commit says and what Delta wrote down beside it."""
    by = f"ingest {commit['run_id']}" if "run_id" in commit else str(commit.get("by", ""))
    operation, parameters = commit["operation"], commit.get("operationParameters", {})
    if operation == "CREATE TABLE":
        return "store made"
    if operation == "OPTIMIZE":
        return "small files of the log put together"
    if operation == "SET TBLPROPERTIES":
        return f"spec put in force by {by}" if by else "spec put in force"
    if parameters.get("mode") == "Overwrite":
        return by or "log rewritten by compact or vacuum"
    return by or "rows appended"


def pin(uri: str, version: int, name: str) -> dict[str, int]:
    """Keep a version whatever vacuum does, until `unpin`. Returns: all pins.

    Raises: StoreError for a version that is not there whole, or a name that is taken or none.
    """
    if not _PIN_NAME.fullmatch(name):
        raise StoreError(f"{uri}: pin {name!r}; a name has letters, digits, and . _ - alone")
    store = FeatureStore.open(uri)
    pins = store.pins()
    if pins.get(name, version) != version:
        raise StoreError(
            f"{uri}: pin {name!r} keeps version {pins[name]}; choose another name, or unpin it"
        )
    whole_snapshot(store, version)
    store.pin(version, name)
    return store.pins()


def unpin(uri: str, name: str) -> dict[str, int]:
    """Let go of a pin: the next vacuum may remove what only its version needs.

    Returns: the pins that are left. Raises: StoreError if there is no such pin.
    """
    store = FeatureStore.open(uri)
    pins = store.pins()
    if name not in pins:
        raise StoreError(f"{uri}: no pin {name!r}; there are {', '.join(sorted(pins)) or 'none'}")
    store.unpin(name)
    return store.pins()
