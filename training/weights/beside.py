"""write_readme: the README.md that lies beside saved weights.

The edge of storage for `readme.py`. Invariant: it is written anew whenever the card or
what was measured changes, so it never tells of other weights.
"""

import json
from typing import Literal

from pipeline.storage import Location
from training.weights.measured import read_measured
from training.weights.readme import model_readme


def write_readme(uri: str, kind: Literal["encoder", "classifier"]) -> None:
    """README.md of a saved model, from its card and what was measured of it."""
    Location(uri).write_bytes("README.md", readme_of(uri, kind).encode())


def readme_of(uri: str, kind: str, command: str | None = None) -> str:
    """The card of a saved model as Markdown. Args: command: see `model_readme`."""
    stored = json.loads(Location(uri).read_bytes(f"{kind}.json"))
    return model_readme(stored, read_measured(uri, stored["sha256"]), command)
