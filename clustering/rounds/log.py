"""BankLog: one bank on storage: a base and the segments pushed since, each file written once.

Knows nothing of what is in memory. Invariant: base and segments, read in any order, are the bank:
the newest row of a clip counts, so a file that is read although another has taken its place
changes nothing.

On storage, under `folder`: `base.json` names the files of the last freeze, merge or restore and the
segments that are in them, `segment-LEVEL-*.parquet` hold what was pushed since, `hold.json` the
step of a freeze that is to come.

Reading must not take much longer than one pass over the bank. So segments are merged: into a new
base when they hold more rows than the base, and every 32 of a level into one of the next level. A
row is so written at most once more for a base and once for each level (32 segments, 1024, ...):
what is written stays in proportion to what is pushed, however large the bank.
"""

import uuid
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from clustering import storage
from clustering.rounds.bank import BankRows, newest_rows
from clustering.rounds.frozen import Owner, RowFile, read_rows, write_rows
from clustering.rounds.saved import SavedBank, name_in, owned_rows

_LEVEL_SEGMENTS = 32
"""Opening a segment costs about as much as reading a few thousand rows."""
_BASE_ROWS = 65536
"""Rows in segments below which no base is written: they are read in a second."""


class RowsOf(NamedTuple):
    """This bank's rows of one file."""

    rows: int
    newest: int
    """Greatest step among them."""
    level: int = 0
    """How often a segment's rows were merged with those of others."""

    @classmethod
    def of(cls, parts: list[BankRows], level: int = 0) -> "RowsOf":
        """What is in these rows."""
        newest = max((int(part.steps.max(initial=0)) for part in parts), default=0)
        return cls(sum(len(part.keys) for part in parts), newest, level)


class BankLog:
    """What a bank must find again after its death, and what a saved state names."""

    def __init__(
        self,
        folder: str,
        home: str,
        owner: Owner,
        streams: Mapping[str, int],
        may_write: storage.MayWrite,
    ) -> None:
        """Args: home: folder of the rounds, from which files are named. owner: whose rows count."""
        self._folder, self._home, self._owner = folder, home, owner
        self._streams, self._may_write = dict(streams), may_write
        self._base: dict[str, RowsOf] = {}
        """By name from the folder of the rounds."""
        self._segments: dict[str, RowsOf] = {}
        """By file name."""
        self._merged: set[str] = set()
        """Segments that are in the base or in another: kept for saved states that name them."""
        self._found = storage.names(folder)
        self.held: int | None = None
        """Step of a freeze that is to come."""
        if "hold.json" in self._found:
            self.held = storage.read_json(self._at("hold.json"))["step"]

    def read(self) -> Iterator[BankRows]:
        """Yield the rows that an earlier incarnation had written."""
        if "base.json" in self._found:
            base = storage.read_json(self._at("base.json"))
            self._merged = set(base["merged"])
            for name in base["files"]:
                yield from self.read_base(name)
        for name in self._found:
            if name.startswith("segment-") and name not in self._merged:
                rows = self._read_segment(name)
                self._segments[name] = RowsOf.of([rows], int(name.split("-")[1]))
                yield rows

    def read_base(self, name: str) -> list[BankRows]:
        """The bank's rows of a file, by its name from the folder of the rounds."""
        rows = list(owned_rows(storage.join(self._home, name), self._streams, self._owner))
        found = RowsOf.of(rows)
        if found.rows:
            self._base[name] = found
        return rows

    def append(self, rows: BankRows, level: int = 0) -> None:
        """Write down rows as a segment."""
        name = f"segment-{level}-{uuid.uuid4().hex}.parquet"
        self.write(self._at(name), rows)
        self._segments[name] = RowsOf.of([rows], level)

    def write(self, uri: str, rows: BankRows) -> RowFile:
        """Write a file of rows, if this pool still may."""
        self._may_write()
        return write_rows(uri, rows, self._streams, self._owner.vshards)

    def hold(self, step: int | None) -> None:
        """Note the step of a freeze that is to come; None: there is none."""
        self._may_write()
        if step is None:
            storage.remove(self._at("hold.json"))
        else:
            storage.write_json(self._at("hold.json"), {"step": step})
        self.held = step

    def rebase(self, uri: str, rows: BankRows, step: int) -> None:
        """From here on the rows of `step` and before are `rows`, which are in file `uri`."""
        # Files may also hold later rows: they stay until a base has all of them.
        self._replace([name for name, found in self._segments.items() if found.newest <= step])
        later = {name: found for name, found in self._base.items() if found.newest > step}
        self._base = {name_in(self._home, uri): RowsOf.of([rows]), **later}
        self.commit()

    def clear(self) -> None:
        """Forget all rows; on storage only with the next `commit`."""
        self._replace(list(self._segments))
        self._base = {}

    def commit(self) -> None:
        """Write down which files are the base, and which segments are not needed beside them."""
        self._may_write()
        content = {"files": list(self._base), "merged": sorted(self._merged)}
        storage.write_json(self._at("base.json"), content)

    def wants_base(self, step: int) -> bool:
        """Whether segments up to `step` are more to read than the bank has rows."""
        due = sum(found.rows for found in self._segments.values() if found.newest <= step)
        based = sum(found.rows for found in self._base.values())
        return due > max(based, _BASE_ROWS)

    def write_base(self, rows: BankRows, step: int) -> None:
        """Make `rows`, all of the bank's of `step` and before, its new base."""
        uri = self._at(f"base-{uuid.uuid4().hex}.parquet")
        self.write(uri, rows)
        self.rebase(uri, rows, step)

    def merge_levels(self, step: int) -> None:
        """Put every 32 segments of a level that hold nothing after `step` into one."""
        for level in sorted({found.level for found in self._segments.values()}):
            due = [
                name
                for name, found in self._segments.items()
                if found.level == level and found.newest <= step
            ][:_LEVEL_SEGMENTS]
            if len(due) == _LEVEL_SEGMENTS:
                rows = BankRows.concat([self._read_segment(name) for name in due])
                self.append(newest_rows(rows), level + 1)
                self._replace(due)
                self.commit()

    def saved(self) -> SavedBank:
        """Names of what this bank is made of now."""
        own = (name_in(self._home, self._at(name)) for name in self._segments)
        return SavedBank((*self._base, *own), self.held)

    def forget(self, kept: set[str]) -> None:
        """Remove own files that the bank does not need any more, but for those in `kept`."""
        self._may_write()
        kept = kept.union(self.saved().files)
        for name in storage.names(self._folder):
            if name.endswith(".parquet") and name_in(self._home, self._at(name)) not in kept:
                storage.remove(self._at(name))
                self._merged.discard(name)

    def _replace(self, names: list[str]) -> None:
        for name in names:
            del self._segments[name]
            self._merged.add(name)

    def _read_segment(self, name: str) -> BankRows:
        width = sum(self._streams.values())
        return BankRows.concat([BankRows.empty(width), *read_rows(self._at(name), width)])

    def _at(self, name: str) -> str:
        return storage.join(self._folder, name)
