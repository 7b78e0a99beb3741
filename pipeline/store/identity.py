"""store_id: which store this is, by the file that says that one is there.

Knows nothing of tables or shards. Invariant: two stores have two ids, also at one path of two
machines; whoever writes into a store can tell that it is the one meant.
"""

import json

from pipeline.storage import Location

STORE_FILE = "store.json"


def store_id(location: Location) -> str | None:
    """The id of the store at a place; None if there is none."""
    try:
        about = json.loads(location.read_bytes(STORE_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    # Stores older than the id are told apart by the spec they were made for.
    return str(about.get("id") or about["spec_hash"])
