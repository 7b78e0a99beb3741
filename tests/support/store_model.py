"""StoreModel: what a feature store must hold after any history, in plain Python.

Knows nothing of Delta, shards or the clips table: it is the second opinion that the store is
compared with. Invariant: one dictionary per spec, changed only by what a run committed.
"""

import hashlib
from dataclasses import dataclass, field, replace

from support.cheap_source import features, outcome


@dataclass
class File:
    content: str
    mtime_ns: int


@dataclass
class Listed:
    """A line of the manifest."""

    uri: str
    label: str
    split: str


@dataclass
class Row:
    """What the store knows of a clip under a spec."""

    listed: Listed
    status: str
    order: int
    content: str = ""
    fp: str = ""
    size: int = -1
    mtime_ns: int = -1
    attempts: int = 0


@dataclass
class Prediction:
    """What a run must do, if nothing stops it."""

    spec: str
    todo: dict[str, str] = field(default_factory=dict)
    """Clip -> why."""
    attempts: dict[str, int] = field(default_factory=dict)
    settled: dict[str, Row | None] = field(default_factory=dict)
    """Clip -> its row without decoding; None: it is removed."""
    counts: dict[str, int] = field(default_factory=dict)
    is_mass_removal: bool = False


def fingerprint(file: File, kind: str) -> str:
    if kind == "sha256":
        return hashlib.sha256(file.content.encode()).hexdigest()
    return f"{len(file.content)}-{file.mtime_ns}"


class StoreModel:
    """Rows by spec and clip, the clips without a file, and the spec in force."""

    def __init__(self, spec: str) -> None:
        self.in_force = spec
        self.rows: dict[str, dict[str, Row]] = {}
        self.missing: dict[str, Row] = {}
        self.order = 0

    def state(self, spec: str, clip: str) -> tuple[str | None, Row] | None:
        """The row a plan under `spec` sees, with the spec it is of (None: it is missing)."""
        if clip in self.missing:
            return None, self.missing[clip]
        if clip in self.rows.get(spec, {}):
            return spec, self.rows[spec][clip]
        others = [(s, rows[clip]) for s, rows in self.rows.items() if clip in rows]
        return max(others, key=lambda found: found[1].order, default=None)

    def known(self) -> set[str]:
        return set(self.missing).union(*self.rows.values())

    def live(self) -> dict[str, tuple[str, str, str]]:
        """Clip -> label, split, features of the data set in force."""
        return {
            clip: (row.listed.label, row.listed.split, features(self.in_force, clip, row.content))
            for clip, row in self.rows.get(self.in_force, {}).items()
            if row.status == "ok"
        }

    def status(self) -> dict[str, int]:
        own = self.rows.get(self.in_force, {})
        ok = sum(row.status == "ok" for row in own.values())
        known, missing = len(self.known()), len(self.missing)
        return {
            "clips": known, "ok": ok, "failed": len(own) - ok, "missing": missing,
            "undecoded": known - len(own) - missing,
        }  # fmt: skip

    def predict(
        self,
        spec: str,
        listing: dict[str, Listed],
        files: dict[str, File],
        kind: str,
        retry_failed: bool,
        allow_mass_delete: bool,
    ) -> Prediction:
        """Args: listing: by clip; files: by uri; kind: of fingerprint."""
        made = Prediction(spec)
        counted = []
        for clip, listed in listing.items():
            found, file = self.state(spec, clip), files.get(listed.uri)
            what = self._what(spec, clip, found, listed, file, kind, retry_failed)
            counted.append(what)
            if what in ("missing", "removed"):
                made.settled[clip] = Row(listed, "missing", 0)
            elif what == "unchanged":
                assert found is not None
                row = found[1]
                if file is None:
                    is_same = row.listed == listed
                    now = replace(row, listed=listed)
                else:
                    is_same = row.listed == listed and row.mtime_ns == file.mtime_ns
                    now = replace(row, listed=listed, mtime_ns=file.mtime_ns)
                if not is_same:
                    made.settled[clip] = now
                    if (row.listed.label, row.listed.split) != (listed.label, listed.split):
                        counted[-1] = "changed"
            else:
                made.todo[clip] = what
                made.attempts[clip] = found[1].attempts if what == "retried" and found else 0
        unlisted = self.known() - set(listing)
        made.settled |= dict.fromkeys(unlisted)
        counted += ["removed"] * len(unlisted)
        made.counts = {what: counted.count(what) for what in counted}
        present = self.known() - set(self.missing)
        gone = sum(
            clip in present and (row is None or row.status == "missing")
            for clip, row in made.settled.items()
        )
        made.is_mass_removal = not allow_mass_delete and gone > 0.2 * len(present)
        return made

    def _what(self, spec, clip, found, listed, file, kind, retry_failed) -> str:
        if found is None:
            return "new" if file else "missing"
        of_spec, row = found
        if of_spec is None:
            return "new" if file else "unchanged"
        if file is None:
            return "removed"
        same_stat = (row.size, row.mtime_ns) == (len(file.content), file.mtime_ns)
        is_hashed = len(row.fp) == 64
        same = same_stat and (is_hashed or row.fp == fingerprint(file, "stat"))
        if not same and kind == "sha256" and is_hashed:
            same = row.fp == fingerprint(file, "sha256")
        if not same:
            return "changed"
        if of_spec != spec:
            return "spec_changed"
        passing = row.status == "timeout" and row.attempts < 2
        return "retried" if row.status != "ok" and (retry_failed or passing) else "unchanged"

    # What a run committed.

    def settle(self, made: Prediction) -> None:
        for clip, row in made.settled.items():
            if row is None or row.status == "missing":
                self.forget(clip)
            if row is not None:
                self.order += 1
                place = self.missing if row.status == "missing" else self.rows[made.spec]
                place[clip] = replace(row, order=self.order)

    def decoded(self, made: Prediction, clip: str, listed: Listed, file: File, kind: str) -> None:
        self.order += 1
        self.missing.pop(clip, None)
        self.rows.setdefault(made.spec, {})[clip] = Row(
            listed, outcome(file.content), self.order, file.content, fingerprint(file, kind),
            len(file.content), file.mtime_ns, made.attempts[clip] + 1,
        )  # fmt: skip

    def forget(self, clip: str) -> None:
        self.missing.pop(clip, None)
        for rows in self.rows.values():
            rows.pop(clip, None)

    def lose(self, clip: str) -> None:
        """The features in force were damaged; what other specs have of the clip was not."""
        del self.rows[self.in_force][clip]

    def forget_specs_but(self, specs: set[str]) -> None:
        self.rows = {spec: rows for spec, rows in self.rows.items() if spec in specs}
