"""write_readme: the README.md that lies beside saved weights.

The edge of storage (fsspec) for `readme.py`. Invariant: it is written anew whenever the card or
what was measured changes, so it never tells of other weights.
"""

import json
from typing import Literal

import fsspec

from training.weights.measured import read_measured
from training.weights.readme import model_readme


def write_readme(uri: str, kind: Literal["encoder", "classifier"]) -> None:
    """README.md of a saved model, from its card and what was measured of it."""
    filesystem, path = fsspec.core.url_to_fs(f"{uri.rstrip('/')}/README.md")
    filesystem.pipe_file(path, readme_of(uri, kind).encode())


def readme_of(uri: str, kind: str, command: str | None = None) -> str:
    """The card of a saved model as Markdown. Args: command: see `model_readme`."""
    uri = uri.rstrip("/")
    with fsspec.open(f"{uri}/{kind}.json", "rb") as file:
        stored = json.loads(file.read())
    return model_readme(stored, read_measured(uri, stored["sha256"]), command)
