"""BankActor: a bank that survives its own death: rows in memory, and a log of them on storage.

Runs as a Ray actor but imports no Ray. Invariant: after `sync` returned, every row pushed before is
read again by a restarted actor, so a round's rows are the same whenever an actor dies.

Why a log and not only a checkpoint: the encoder that made a row has moved on since (`features:
train`), so a row that is lost cannot be made again, and the round would depend on the death. The
log is the checkpoint, too: a saved state names its files.
"""

import uuid
from collections.abc import Mapping

import numpy as np

from clustering import storage
from clustering.rounds.bank import Bank, BankAges, BankRows
from clustering.rounds.frozen import Owner, RowFile
from clustering.rounds.log import BankLog
from clustering.rounds.saved import SavedBank, home_of, read_saved, saved_rows


class BankActor:
    """Owner of the virtual shards v with v % count == index."""

    def __init__(
        self,
        owner: Owner,
        folder: str,
        home: str,
        streams: Mapping[str, int],
        *,
        may_write: storage.MayWrite = storage.always,
    ) -> None:
        """Read back what an earlier incarnation had acknowledged.

        Args: folder: of this bank alone. home: of the rounds.
        """
        self._owner, self._folder, self._home = owner, folder, home
        self._streams = dict(streams)
        self._incarnation = uuid.uuid4().hex
        self._bank = Bank(sum(streams.values()))
        self._unsaved: list[BankRows] = []
        self._log = BankLog(folder, home, owner, streams, may_write)
        # Before the first row: what a freeze to come wants must not be folded.
        self._bank.clear(self._log.held)
        for rows in self._log.read():
            self._bank.push(*rows)

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
            self._log.append(BankRows.concat(self._unsaved))
            self._unsaved = []
            self._merge()
        return self._incarnation

    def hold(self, step: int) -> None:
        """See `Bank.hold`; also after a restart of this actor."""
        self._log.hold(step)
        self._bank.hold(step)

    def freeze(self, uri: str, step: int) -> RowFile:
        """Write the rows of `step` and before as file `uri`; a retry writes the same rows."""
        rows = self._bank.freeze(step)
        written = self._log.write(uri, rows)
        self._log.rebase(uri, rows, step)
        return written

    def release(self, step: int) -> None:
        """See `Bank.release`: who asked for the freeze has noted what it wrote."""
        if self._log.held == step:
            self._log.hold(None)
        self._bank.release(step)

    def saved(self) -> SavedBank:
        """Write down what was pushed, and name the files that hold the rows now."""
        self.sync()
        return self._log.saved()

    def forget(self, kept: set[str]) -> None:
        """Remove files that this bank needs no more, but for those that saved states name."""
        self._log.forget(kept)

    def restore(self, uri: str) -> None:
        """Hold the saved rows of this actor's virtual shards, whoever saved them."""
        saved = read_saved(uri)
        self._log.clear()
        self._log.hold(saved.held)
        self._bank.clear(saved.held)
        self._unsaved = []
        if home_of(uri) == self._home:
            for name in saved.files:
                for rows in self._log.read_base(name):
                    self._bank.push(*rows)
        else:
            # A copy: the other run may remove its files.
            rows = saved_rows(uri, self._streams, self._owner)
            self._bank.push(*rows)
            self._log.append(rows)
        self._log.commit()

    def _merge(self) -> None:
        """Keep what a restart or a restore has to read in proportion to the bank."""
        step = self._bank.settled_step
        if self._log.wants_base(step):
            self._log.write_base(self._bank.settle(step), step)
        self._log.merge_levels(step)

    def ages(self) -> BankAges:
        """How many clips this bank holds, and how old they are."""
        return self._bank.ages()
