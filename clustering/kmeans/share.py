"""Share: the rows one process holds, and every pass k-means makes over them.

Knows nothing of Ray, of rounds or of who holds the other rows. Invariant: the result of a pass is
a function of the source's blocks and the arguments; what is summed lies on a grid (kmeans.exact
explains why), so results of any grouping of blocks into shares add up to the same bits.

Shapes: N rows, W width of a row, D width of a point, K clusters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from clustering.errors import BadVectors
from clustering.kmeans.assign import assign, assign_cuda, one_blas_thread, scores_by_block
from clustering.kmeans.exact import add_by_label, fixed_point_sum, snap
from clustering.kmeans.hashing import hash64
from clustering.kmeans.label_table import KeyIndex, LabelTable
from clustering.kmeans.space import PointSpace

POSTERIOR_EXPONENT = -24
"""Grid of probabilities: finer than float32 needs, exact for 2^29 rows in one cluster."""


_NOT_COUNTED = np.empty(0, dtype=np.int64)


class RowBlock(NamedTuple):
    """Rows (or the points made of them) that are never split: keys uint64 [n], float [n, W]."""

    keys: np.ndarray
    rows: np.ndarray


class Source(Protocol):
    """Where a share's blocks come from; small enough to send to an actor."""

    @property
    def token(self) -> str:
        """Names the content: equal tokens, equal blocks."""
        ...

    @property
    def keep_rows(self) -> bool:
        """Whether rows stay in memory between passes, besides the points made of them."""
        ...

    def blocks(self) -> Iterator[RowBlock]:
        """The blocks in a fixed order."""
        ...


@dataclass(frozen=True)
class PointRule:
    """How rows become the numbers that are added: space, grid, origin and sample."""

    space: PointSpace
    exponent: int = 0
    """Points are multiples of 2^exponent."""
    shift: bytes = b""
    """float32 [D] subtracted first (Euclidean only); empty: nothing. Bytes, because rules are
    compared: an actor keeps the points of the rule it was last asked for."""
    sample_below: int | None = None
    """Only rows whose hash is at most this; None: all rows."""
    sample_seed: int = 0
    """Seed of that hash."""

    def everything(self) -> "PointRule":
        """The same without sampling."""
        return replace(self, sample_below=None)

    @property
    def shift_D(self) -> np.ndarray | None:
        """The shift as an array."""
        return np.frombuffer(self.shift, dtype=np.float32) if self.shift else None

    def points(self, block: RowBlock) -> RowBlock:
        """Keys and points, float32 [n, D] on the grid, of the rows that are in the sample."""
        keys, rows = block
        if self.sample_below is not None:
            chosen = hash64(keys, self.sample_seed) <= np.uint64(self.sample_below)
            keys, rows = keys[chosen], rows[chosen]
        x = self.space.points(rows)
        if self.shift_D is not None:
            x = x - self.shift_D
        return RowBlock(keys, snap(x, self.exponent))


class Moments(NamedTuple):
    """What must be known before a grid can be chosen."""

    n_rows: int
    max_abs: float


class Sums(NamedTuple):
    """What a pass adds up, of one share or of several: both parts are exact."""

    sums: np.ndarray
    """float64, on a grid."""
    counts: np.ndarray
    """int64; empty where a pass counts nothing."""

    @classmethod
    def zeros(cls, k: int, width: int) -> "Sums":
        """Nothing yet: [K, D] and [K]."""
        return cls(np.zeros((k, width)), np.zeros(k, dtype=np.int64))


class HashedPoints(NamedTuple):
    """Points that were chosen by the hash of their key."""

    hashes: np.ndarray
    """uint64 [n]."""
    points: np.ndarray
    """float32 [n, D]."""


class LabelledPoints(NamedTuple):
    """The nearest centroid of every row."""

    keys: np.ndarray
    """uint64 [n]."""
    labels: np.ndarray
    """int32 [n]."""
    squared: np.ndarray
    """Squared distance to the centroid, float32 [n]."""


class LastSums(NamedTuple):
    """What the last Lloyd iteration added up."""

    rule: PointRule
    total: Sums
    labels: list[np.ndarray]
    """Per block; empty before the first iteration."""


class Share:
    """Blocks of one source and the passes over them."""

    def __init__(self, source: Source, block_rows: int, device: Literal["cpu", "cuda"]) -> None:
        self._source = source
        self._block_rows = block_rows
        self._device = device
        self._rows: list[RowBlock] | None = None
        self._kept: tuple[PointRule, list[RowBlock]] | None = None
        self._last: LastSums | None = None

    def moments(self, space: PointSpace) -> Moments:
        """Number of rows and greatest coordinate of their points.

        Raises: BadVectors for NaN or infinite rows, and for rows without a direction when the
            space is spherical; the first keys are named.
        """
        n_rows, max_abs = 0, 0.0
        for keys, rows in self._blocks():
            _check_rows(keys, rows, space)
            n_rows += len(keys)
            if not space.spherical and len(rows):
                max_abs = max(max_abs, float(np.abs(space.points(rows)).max()))
        return Moments(n_rows, 1.0 if space.spherical else max_abs)

    def totals(self, rule: PointRule, square_exponent: int) -> Sums:
        """Sum of points, float64 [D], and of their squared lengths, int64 [1] on its own grid."""
        total_1D = np.zeros((1, rule.space.width))
        squares = 0
        for _, x in self._points(rule):
            add_by_label(x, np.zeros(len(x), dtype=np.int32), total_1D)
            lengths = np.einsum("nd,nd->n", x, x, dtype=np.float64)
            squares += fixed_point_sum(lengths, square_exponent)
        return Sums(total_1D[0], np.array([squares], dtype=np.int64))

    def keys(self) -> np.ndarray:
        """Keys of this share's rows, uint64."""
        return np.concatenate([np.empty(0, np.uint64), *(block.keys for block in self._blocks())])

    def smallest_hashes(self, seed: int, n: int) -> np.ndarray:
        """The n smallest hashes of this share's keys, uint64, sorted."""
        hashes = [hash64(block.keys, seed) for block in self._blocks()]
        merged = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
        if len(merged) > n:
            merged = np.partition(merged, n - 1)[:n]
        return np.sort(merged)

    def points_below(self, rule: PointRule, seed: int, below: int) -> HashedPoints:
        """The points whose hash is at most `below`."""
        hashes = [np.empty(0, dtype=np.uint64)]
        found = [np.empty((0, rule.space.width), dtype=np.float32)]
        for keys, x in self._points(rule):
            block_hashes = hash64(keys, seed)
            chosen = block_hashes <= np.uint64(below)
            hashes.append(block_hashes[chosen])
            found.append(x[chosen])
        return HashedPoints(np.concatenate(hashes), np.concatenate(found))

    def lloyd_sums(
        self, rule: PointRule, centroids_KD: np.ndarray, offset_K: np.ndarray | None
    ) -> Sums:
        """Assign and add: sums float64 [K, D] and counts int64 [K].

        Rows that kept their label since the last call are not added again: exact sums have the
        same bits however they were reached.
        """
        last = self._last
        if last is None or last.rule != rule or last.total.sums.shape != centroids_KD.shape:
            last = LastSums(rule, Sums.zeros(*centroids_KD.shape), [])
        # The total is changed in place: a call that dies half way must not be gone on from.
        self._last = None
        labels = []
        with one_blas_thread():
            for i, (_, x) in enumerate(self._points(rule)):
                labels.append(self._assign(x, centroids_KD, offset_K))
                _move(x, last.labels[i] if last.labels else None, labels[-1], last.total)
        self._last = last._replace(labels=labels)
        return Sums(last.total.sums.copy(), last.total.counts.copy())

    def label_sums(self, rule: PointRule, table: LabelTable, k: int) -> Sums:
        """Sums float64 [K, D] and counts int64 [K] under given labels; rows not in the table are
        left out."""
        total = Sums.zeros(k, rule.space.width)
        index = KeyIndex(table.keys_N)
        for keys, x in self._points(rule):
            labels = table.lookup(keys, index=index)
            known = labels >= 0
            if known.all():  # The usual case, without a copy of the block.
                _add(x, labels, total)
            else:
                _add(x[known], labels[known], total)
        return total

    def balance_mass(
        self, rule: PointRule, centroids_KD: np.ndarray, offset_K: np.ndarray, epsilon: float
    ) -> Sums:
        """Sum over rows of softmax((x c' + offset) / epsilon), float64 [K] on the grid."""
        mass_1K = np.zeros((1, len(centroids_KD)))
        with one_blas_thread():
            for _, x in self._points(rule):
                for _, scores in scores_by_block(x, centroids_KD, offset_K, self._block_rows):
                    soft = snap(_softmax(scores, epsilon), POSTERIOR_EXPONENT)
                    add_by_label(soft, np.zeros(len(soft), dtype=np.int32), mass_1K)
        return Sums(mass_1K[0], _NOT_COUNTED)

    def label(
        self, rule: PointRule, centroids_KD: np.ndarray, offset_K: np.ndarray | None
    ) -> LabelledPoints:
        """The nearest centroid of every row."""
        keys, labels = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int32)]
        squared = [np.empty(0, dtype=np.float32)]
        with one_blas_thread():
            for block_keys, x in self._points(rule):
                found = self._assign(x, centroids_KD, offset_K)
                keys.append(block_keys)
                labels.append(found)
                squared.append(_squared_distances(x, centroids_KD, found))
        return LabelledPoints(np.concatenate(keys), np.concatenate(labels), np.concatenate(squared))

    def posterior_sums(
        self,
        rule: PointRule,
        prototypes: tuple[tuple[int, np.ndarray], ...],
        temperature: float,
        table: LabelTable,
    ) -> Sums:
        """Posteriors added by label over streams, float64 [K, K] on the grid; rows not in
        the table are left out.

        Args: prototypes: per stream, its first column in the point and its prototypes [K, P].
        """
        k = len(prototypes[0][1])
        sums_KK = np.zeros((k, k))
        index = KeyIndex(table.keys_N)
        with one_blas_thread():
            for keys, x in self._points(rule):
                labels = table.lookup(keys, index=index)
                known = labels >= 0
                if not known.all():
                    x, labels = x[known], labels[known]
                for start, prototypes_KP in prototypes:
                    h = np.ascontiguousarray(x[:, start : start + prototypes_KP.shape[1]])
                    for at, scores in scores_by_block(h, prototypes_KP, None, self._block_rows):
                        soft = snap(_softmax(scores, temperature), POSTERIOR_EXPONENT)
                        add_by_label(soft, labels[at : at + len(soft)], sums_KK)
        return Sums(sums_KK, _NOT_COUNTED)

    def _assign(
        self, x_ND: np.ndarray, centroids_KD: np.ndarray, offset_K: np.ndarray | None
    ) -> np.ndarray:
        if self._device == "cuda":
            return assign_cuda(x_ND, centroids_KD, offset_K)
        return assign(x_ND, centroids_KD, offset_K, self._block_rows)

    def _blocks(self) -> Iterator[RowBlock]:
        if self._rows is not None:
            yield from self._rows
            return
        if not self._source.keep_rows:
            yield from self._source.blocks()
            return
        self._rows = list(self._source.blocks())
        yield from self._rows

    def _points(self, rule: PointRule) -> Iterator[RowBlock]:
        """Points by a rule: kept when they are what Lloyd iterates over, else made again."""
        if self._kept is not None and self._kept[0] == rule:
            yield from self._kept[1]
            return
        made = (rule.points(block) for block in self._blocks())
        if rule.space.combine == "each" or (
            self._kept is not None and self._kept[0].everything() == rule
        ):
            # One pass over everything must not evict the sample or double the memory.
            yield from made
            return
        self._kept = None
        self._kept = (rule, list(made))
        yield from self._kept[1]


def _check_rows(keys: np.ndarray, rows: np.ndarray, space: PointSpace) -> None:
    for start, stop in space.slices:
        part = rows[:, start:stop].astype(np.float32, copy=False)
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            raise _bad(keys[~finite], "NaN or infinite values")
        if space.spherical:
            empty = ~part.any(axis=1)
            if empty.any():
                raise _bad(keys[empty], "only zeros: a spherical clustering needs a direction")


def _bad(keys: np.ndarray, what: str) -> BadVectors:
    shown = ", ".join(str(key) for key in keys[:5])
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    message = f"vectors with {what}: keys {shown}{more}. Drop or repair these rows."
    return BadVectors(message).of(keys[:5])


def _softmax(scores: np.ndarray, temperature: float) -> np.ndarray:
    logits = scores / np.float32(temperature)
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


def _squared_distances(x: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    distances = np.empty(len(x), dtype=np.float32)
    for start in range(0, len(x), 1024):
        stop = start + 1024
        difference = x[start:stop].astype(np.float64) - centroids[labels[start:stop]]
        distances[start:stop] = np.einsum("nd,nd->n", difference, difference)
    return distances


def _add(x: np.ndarray, labels: np.ndarray, total: Sums) -> None:
    add_by_label(x, labels, total.sums)
    np.add(total.counts, np.bincount(labels, minlength=len(total.counts)), out=total.counts)


def _move(x: np.ndarray, before: np.ndarray | None, labels: np.ndarray, total: Sums) -> None:
    """Bring a total under the labels before up to the labels now."""
    if before is None:
        _add(x, labels, total)
        return
    moved = np.flatnonzero(before != labels)
    rows, left = x[moved], before[moved]
    add_by_label(rows, left, total.sums, weight=-1.0)
    np.subtract(total.counts, np.bincount(left, minlength=len(total.counts)), out=total.counts)
    _add(rows, labels[moved], total)
