"""A bank that survives its own death: rows in memory, and on storage what was acknowledged.

Runs as a Ray actor but imports no Ray. Invariant: after `sync` returned, every row pushed before is
read again by a restarted actor, so a round's rows are the same whenever an actor dies.

On storage, under `folder`: `base.json` names the part file of the last freeze (or restore), and
`segment-*.parquet` hold what was pushed since.
"""

import uuid
from collections.abc import Mapping

import numpy as np

from clustering import storage
from clustering.kmeans.hashing import vshard_of
from clustering.rounds.bank import Bank, BankRows
from clustering.rounds.snapshot import Part, read_rows, saved_rows, write_part


class BankActor:
    """Owner of the virtual shards v with v % count == index."""

    def __init__(
        self, index: int, count: int, folder: str, streams: Mapping[str, int], vshards: int
    ) -> None:
        """Read back what an earlier incarnation had acknowledged."""
        self._index, self._count = index, count
        self._folder = folder
        self._streams = dict(streams)
        self._width = sum(streams.values())
        self._vshards = vshards
        self._incarnation = uuid.uuid4().hex
        self._bank = Bank(self._width)
        self._unsaved: list[BankRows] = []
        self._segments: dict[str, int] = {}
        self._recover()

    def push(self, keys_B: np.ndarray, steps_B: np.ndarray, rows_BW: np.ndarray) -> str:
        """Take rows. Returns: the incarnation that holds them; they are lost if it dies."""
        # Arguments are views into the object store; keeping them would fill it.
        rows = BankRows(keys_B.copy(), steps_B.copy(), rows_BW.copy())
        self._bank.push(*rows)
        self._unsaved.append(rows)
        return self._incarnation

    def sync(self) -> str:
        """Write down what was pushed. Returns: the incarnation whose pushes are now safe."""
        if self._unsaved:
            rows = BankRows.concat(self._unsaved)
            name = f"segment-{uuid.uuid4().hex}.parquet"
            self._write(storage.join(self._folder, name), rows)
            self._segments[name] = int(rows.steps.max())
            self._unsaved = []
        return self._incarnation

    def freeze(self, uri: str, step: int) -> Part:
        """Write the rows of `step` and before as part file `uri`; a retry writes the same rows."""
        part = self._write(uri, self._bank.freeze(step))
        self._rebase(uri)
        for name in [name for name, newest in self._segments.items() if newest <= step]:
            storage.remove(storage.join(self._folder, name))
            del self._segments[name]
        return part

    def save(self, uri: str) -> None:
        """Write all live rows into the folder `uri`."""
        self._write(storage.join(uri, f"bank-{self._index:04d}.parquet"), self._bank.everything())

    def restore(self, uri: str) -> None:
        """Hold the saved rows of this actor's virtual shards, whoever saved them."""
        saved = saved_rows(uri, self._streams)
        mine = vshard_of(saved.keys, self._vshards) % self._count == self._index
        rows = saved.take(mine)
        base = storage.join(self._folder, f"base-{uuid.uuid4().hex}.parquet")
        self._write(base, rows)
        self._rebase(base)
        for name in self._segments:
            storage.remove(storage.join(self._folder, name))
        self._segments, self._unsaved = {}, []
        self._bank.replace(rows)

    def ages(self) -> tuple[int, int, int, int, int]:
        """Clips, sum of steps, oldest and newest step, bytes."""
        return (*self._bank.ages(), self._bank.n_bytes)

    def _write(self, uri: str, rows: BankRows) -> Part:
        return write_part(uri, rows, self._streams, self._vshards)

    def _rebase(self, uri: str) -> None:
        storage.write_json(storage.join(self._folder, "base.json"), {"uri": uri})

    def _recover(self) -> None:
        found = storage.names(self._folder)
        if "base.json" in found:
            base = storage.read_json(storage.join(self._folder, "base.json"))["uri"]
            for rows in read_rows(base, self._width):
                self._bank.push(*rows)
        for name in found:
            if name.startswith("segment-"):
                groups = list(read_rows(storage.join(self._folder, name), self._width))
                for rows in groups:
                    self._bank.push(*rows)
                self._segments[name] = max((int(rows.steps.max()) for rows in groups), default=0)
