"""LloydState, where a fit stands, and StateFile, which keeps it on storage between iterations.

Knows nothing of how an iteration is made. Invariant: a fit that goes on from a saved state has the
same bits as one that was never interrupted.

Shapes: K clusters, D width.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from clustering import storage


@dataclass
class LloydState:
    """All that a resumed fit needs to go on with the same bits."""

    centroids_KD: np.ndarray
    """float32, in the coordinates of the plan."""
    limit: int
    """Most iterations: fewer after a warm start."""
    offset_K: np.ndarray | None = None
    """Balancing term of the last assignment, float32; None without balancing."""
    inertia: list[float] = field(default_factory=list)
    """One value per iteration, before its update."""
    n_empty: list[int] = field(default_factory=list)
    """Clusters without rows, likewise."""
    done: bool = False

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as named arrays."""
        arrays = {
            "centroids": self.centroids_KD,
            "inertia": np.array(self.inertia),
            "n_empty": np.array(self.n_empty, dtype=np.int64),
            "done": np.array(self.done),
            "limit": np.array(self.limit),
        }
        return arrays if self.offset_K is None else {**arrays, "offset": self.offset_K}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "LloydState":
        """Inverse of `arrays`."""
        return cls(
            centroids_KD=arrays["centroids"],
            limit=int(arrays["limit"]),
            offset_K=arrays.get("offset"),
            inertia=arrays["inertia"].tolist(),
            n_empty=arrays["n_empty"].tolist(),
            done=bool(arrays["done"]),
        )


class Checkpoint(Protocol):
    """Where a fit keeps its state after each iteration."""

    def load(self) -> LloydState | None:
        """The last state, or None."""
        ...

    def save(self, state: LloydState) -> None:
        """Replace the state."""
        ...


class StateFile:
    """A `Checkpoint` in one file, replaced after each iteration."""

    def __init__(self, uri: str, may_write: storage.MayWrite = storage.always) -> None:
        self._uri, self._may_write = uri, may_write

    def load(self) -> LloydState | None:
        """See `Checkpoint.load`."""
        try:
            return LloydState.from_arrays(storage.read_arrays(self._uri))
        except FileNotFoundError:
            return None

    def save(self, state: LloydState) -> None:
        """See `Checkpoint.save`."""
        self._may_write()
        storage.write_arrays(self._uri, state.arrays())
