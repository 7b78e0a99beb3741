"""Bank: the newest row of each clip, and the freeze that a round is made of.

Pure numpy: knows nothing of Ray or files. Invariant: the rows at a freeze depend on what was
pushed, not on the order or the grouping of the pushes; rows of later steps wait for the next round.

Shapes: N clips, B rows of a push, W width of a row.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from clustering.errors import BadVectors
from clustering.kmeans.hashing import GOLDEN
from clustering.rounds.protocol import BankStats
from clustering.rounds.targets import stream_slices

_FOLD_ROWS = 65536
"""Pending rows that are worth sorting in before a freeze asks for it."""
_LOCKSTEP = 16
"""Steps that one rank may be ahead of another: more than synchronous training allows."""


class BankRows(NamedTuple):
    """Rows by key."""

    keys: np.ndarray
    """uint64 [N]; sorted where the rows come from a freeze."""
    steps: np.ndarray
    """int64 [N], training step at which a row was computed."""
    rows: np.ndarray
    """float16 [N, W]."""

    @classmethod
    def empty(cls, width: int) -> "BankRows":
        """No rows."""
        return cls(
            np.empty(0, dtype=np.uint64),
            np.empty(0, dtype=np.int64),
            np.empty((0, width), dtype=np.float16),
        )

    @classmethod
    def concat(cls, parts: "list[BankRows]") -> "BankRows":
        """All rows of the parts, at least one, in their order."""
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def take(self, index: np.ndarray) -> "BankRows":
        """The rows at `index`."""
        return BankRows(self.keys[index], self.steps[index], self.rows[index])


class BankAges(NamedTuple):
    """Steps of the rows one bank holds; zeros without rows."""

    n_rows: int
    step_sum: int
    oldest: int
    newest: int
    n_bytes: int


def stats_of(banks: list[BankAges]) -> BankStats:
    """State of the banks of a run together."""
    held = [ages for ages in banks if ages.n_rows]
    rows = sum(ages.n_rows for ages in held)
    newest = max((ages.newest for ages in held), default=0)
    oldest = min((ages.oldest for ages in held), default=0)
    return BankStats(
        rows=rows,
        age_mean=newest - sum(ages.step_sum for ages in held) / rows if rows else 0.0,
        age_max=newest - oldest,
        bytes=sum(ages.n_bytes for ages in banks),
    )


def check_push(
    keys_B: np.ndarray, features_BW: np.ndarray, streams: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A push as uint64 [B] and float16 [B, W], in memory of its own.

    Raises: BadVectors, naming the keys, for a wrong width, NaN, infinity, or a stream of zeros.
    """
    width = sum(streams.values())
    keys = np.array(keys_B, dtype=np.uint64).reshape(-1)
    rows = np.array(features_BW, dtype=np.float16)
    if rows.shape != (len(keys), width):
        raise BadVectors(
            f"pushed features have shape {rows.shape} for {len(keys)} keys; the bank holds rows of "
            f"{width} = {dict(streams)}. Push all streams side by side."
        )
    for name, (start, stop) in stream_slices(streams).items():
        part = rows[:, start:stop].astype(np.float32)
        energy = np.einsum("bw,bw->b", part, part)
        good = (energy > 0) & np.isfinite(energy)
        if not good.all():
            shown = ", ".join(str(key) for key in keys[~good][:5])
            raise BadVectors(
                f"{(~good).sum()} of {len(keys)} rows hold NaN, infinity or only zeros in stream "
                f"{name}: keys {shown}. The encoder's output is broken; look at its loss."
            )
    return keys, rows


class Bank:
    """Rows of the clips whose virtual shards one process owns."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._live = BankRows.empty(width)
        self._pending: list[BankRows] = []
        self._n_pending = 0
        self._fold_above = _FOLD_ROWS
        self._held: int | None = None
        self._newest = 0

    def push(self, keys_B: np.ndarray, steps_B: np.ndarray, rows_BW: np.ndarray) -> None:
        """Take rows over; they are sorted in later."""
        if len(keys_B) == 0:
            return
        self._pending.append(BankRows(keys_B, steps_B, rows_BW))
        self._n_pending += len(keys_B)
        self._newest = max(self._newest, int(steps_B.max()))
        if self._n_pending > self._fold_above:
            self._shrink()

    def hold(self, step: int) -> None:
        """A freeze at `step` will come, however late: keep the rows it will want."""
        self._held = step

    def freeze(self, step: int) -> BankRows:
        """Rows pushed at `step` or before, sorted by key; later ones stay pending.

        The same again, however many rows were pushed in between, while `step` is held.
        """
        return self._fold(step)

    def release(self, step: int) -> None:
        """No freeze at `step` will come any more; one at another step may."""
        if self._held == step:
            self._held = None

    def everything(self) -> BankRows:
        """Newest row of every clip, sorted by key; changes nothing that a freeze will see."""
        return self._merged(None)[0]

    def kept(self) -> tuple[BankRows, int | None]:
        """What a bank that is to go on with this one has to be given: rows, the newest of a clip
        among them, and the step of a freeze to come."""
        if self._held is None:
            return self.everything(), None
        return BankRows.concat([self._live, *self._pending]), self._held

    def clear(self, held: int | None = None) -> None:
        """Forget everything. Args: held: as in `hold`."""
        self._live, self._pending, self._n_pending = BankRows.empty(self._width), [], 0
        self._held, self._newest = held, 0

    @property
    def settled_step(self) -> int:
        """The step up to which no freeze will ask for more than the newest row of a clip.

        The last steps are not settled: the next freeze may be asked for by a rank that is behind.
        Nothing after a held step is: its freeze would find rows of later steps.
        """
        step = self._newest - _LOCKSTEP
        return step if self._held is None else min(step, self._held)

    def settle(self, step: int) -> BankRows:
        """Rows of `step` and before, sorted by key. Args: step: not above `settled_step`."""
        return self._fold(step)

    @property
    def n_bytes(self) -> int:
        """Memory of the rows."""
        row_bytes = 16 + 2 * self._width
        return (len(self._live.keys) + self._n_pending) * row_bytes

    def ages(self) -> BankAges:
        """How many clips there are, and how old."""
        steps = self.everything().steps
        if not len(steps):
            return BankAges(0, 0, 0, 0, self.n_bytes)
        oldest, newest = int(steps.min()), int(steps.max())
        return BankAges(len(steps), int(steps.sum()), oldest, newest, self.n_bytes)

    def _shrink(self) -> None:
        """Drop older versions, so that epochs between freezes do not pile up in memory."""
        self._fold(self.settled_step)
        self._fold_above = max(_FOLD_ROWS, 2 * (len(self._live.keys) + self._n_pending))

    def _fold(self, step: int) -> BankRows:
        self._live, later = self._merged(step)
        self._pending = [later] if len(later.keys) else []
        self._n_pending = len(later.keys)
        return self._live

    def _merged(self, step: int | None) -> tuple[BankRows, BankRows]:
        """Live rows with the pending ones up to `step`, and the pending ones after it."""
        if not self._pending:
            return self._live, BankRows.empty(self._width)
        pushed = BankRows.concat(self._pending)
        due = np.ones(len(pushed.keys), bool) if step is None else pushed.steps <= step
        if due.all():
            return _update(self._live, newest_rows(pushed)), BankRows.empty(self._width)
        return _update(self._live, newest_rows(pushed.take(due))), pushed.take(~due)


def newest_rows(rows: BankRows) -> BankRows:
    """One row per key, sorted: the greatest step; of equal steps the greatest content."""
    order = np.lexsort((rows.steps, rows.keys))
    keys, steps = rows.keys[order], rows.steps[order]
    again = keys[1:] == keys[:-1]
    if (again & (steps[1:] == steps[:-1])).any():
        order = np.lexsort((_content(rows.rows), rows.steps, rows.keys))
    elif not again.any():
        return rows.take(order)
    return rows.take(order[np.append(~again, True)])


def _content(rows_NW: np.ndarray) -> np.ndarray:
    """A 64-bit number per row that depends on its bits alone: breaks ties without an order."""
    bits = rows_NW.view(np.uint16).astype(np.uint64)
    weights = np.arange(1, rows_NW.shape[1] + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        weights = weights * GOLDEN | np.uint64(1)
        return np.asarray((bits * weights).sum(axis=1, dtype=np.uint64))


def _update(live: BankRows, newest: BankRows) -> BankRows:
    """Live rows with the newest ones in; both have sorted, distinct keys."""
    if not len(live.keys):
        return newest
    if not len(newest.keys):
        return live
    position = np.minimum(np.searchsorted(live.keys, newest.keys), len(live.keys) - 1)
    known = live.keys[position] == newest.keys
    contested = BankRows.concat([live.take(position[known]), newest.take(known)])
    winners = newest_rows(contested)
    at = np.searchsorted(live.keys, winners.keys)
    steps, rows = live.steps.copy(), live.rows.copy()
    steps[at], rows[at] = winners.steps, winners.rows
    merged = BankRows(live.keys, steps, rows)
    if known.all():
        return merged
    merged = BankRows.concat([merged, newest.take(~known)])
    return merged.take(np.argsort(merged.keys, kind="stable"))
