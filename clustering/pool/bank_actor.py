"""BankActor: a bank that survives its own death: rows in memory, and a log of them on storage.

Runs as a Ray actor but imports no Ray. Invariant: after `sync` returned, every row pushed before is
read again by a restarted actor, so a round's rows are the same whenever an actor dies.

Why a log and not only a checkpoint: the encoder that made a row has moved on since (`features:
train`), so a row that is lost cannot be made again, and the round would depend on the death.

On storage, under `folder`: `base.json` names the file of the last freeze (or restore),
`segment-*.parquet` hold what was pushed since, `hold.json` the step of a freeze that is to come.
"""

import uuid
from collections.abc import Mapping

import numpy as np

from clustering import storage
from clustering.rounds.bank import Bank, BankAges, BankRows
from clustering.rounds.frozen import Owner, RowFile, read_rows, saved_rows, write_rows


class BankActor:
    """Owner of the virtual shards v with v % count == index."""

    def __init__(
        self,
        index: int,
        count: int,
        folder: str,
        streams: Mapping[str, int],
        vshards: int,
        *,
        may_write: storage.MayWrite = storage.always,
    ) -> None:
        """Read back what an earlier incarnation had acknowledged."""
        self._may_write = may_write
        self._owner = Owner(index, count, vshards)
        self._folder = folder
        self._streams = dict(streams)
        self._incarnation = uuid.uuid4().hex
        self._bank = Bank(sum(streams.values()))
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
            self._write(self._at(name), rows)
            self._segments[name] = int(rows.steps.max())
            self._unsaved = []
        return self._incarnation

    def hold(self, step: int) -> None:
        """See `Bank.hold`; also after a restart of this actor."""
        self._may_write()
        storage.write_json(self._at("hold.json"), {"step": step})
        self._bank.hold(step)

    def freeze(self, uri: str, step: int) -> RowFile:
        """Write the rows of `step` and before as file `uri`; a retry writes the same rows."""
        written = self._write(uri, self._bank.freeze(step))
        self._rebase(uri)
        # A segment may also hold later rows: it stays until a freeze has all of it.
        for name in [name for name, newest in self._segments.items() if newest <= step]:
            storage.remove(self._at(name))
            del self._segments[name]
        return written

    def save(self, uri: str) -> None:
        """Write all live rows into the folder `uri`."""
        name = f"bank-{self._owner.index:04d}.parquet"
        self._write(storage.join(uri, name), self._bank.everything())

    def restore(self, uri: str) -> None:
        """Hold the saved rows of this actor's virtual shards, whoever saved them."""
        rows = saved_rows(uri, self._streams, self._owner)
        base = self._at(f"base-{uuid.uuid4().hex}.parquet")
        self._write(base, rows)
        self._rebase(base)
        for name in self._segments:
            storage.remove(self._at(name))
        self._segments, self._unsaved = {}, []
        self._bank.replace(rows)

    def ages(self) -> BankAges:
        """How many clips this bank holds, and how old they are."""
        return self._bank.ages()

    def _at(self, name: str) -> str:
        return storage.join(self._folder, name)

    def _write(self, uri: str, rows: BankRows) -> RowFile:
        self._may_write()
        return write_rows(uri, rows, self._streams, self._owner.vshards)

    def _rebase(self, uri: str) -> None:
        self._may_write()
        storage.write_json(self._at("base.json"), {"uri": uri})
        storage.remove(self._at("hold.json"))

    def _recover(self) -> None:
        found = storage.names(self._folder)
        width = sum(self._streams.values())
        if "hold.json" in found:
            self._bank.hold(storage.read_json(self._at("hold.json"))["step"])
        if "base.json" in found:
            for rows in read_rows(storage.read_json(self._at("base.json"))["uri"], width):
                self._bank.push(*rows)
        for name in found:
            if name.startswith("segment-"):
                groups = list(read_rows(self._at(name), width))
                for rows in groups:
                    self._bank.push(*rows)
                self._segments[name] = max((int(rows.steps.max()) for rows in groups), default=0)
