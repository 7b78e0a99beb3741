"""The rows one process holds, and every pass k-means makes over them.

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
from clustering.kmeans.label_table import KeyIndex, lookup
from clustering.kmeans.views import View, points

POSTERIOR_EXPONENT = -24
"""Grid of probabilities: finer than float32 needs, exact for 2^29 rows in one cluster."""


class Block(NamedTuple):
    """Rows that are never split: keys uint64 [n], rows float [n, W]."""

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

    def blocks(self) -> Iterator[Block]:
        """The blocks in a fixed order."""
        ...


@dataclass(frozen=True)
class Preparation:
    """How rows become the numbers that are added: view, grid, origin and sample."""

    view: View
    exponent: int = 0
    """Points are multiples of 2^exponent."""
    shift: bytes = b""
    """float32 [D] subtracted first (Euclidean only); empty: nothing."""
    sample_below: int | None = None
    """Only rows whose hash is at most this; None: all rows."""
    sample_seed: int = 0
    """Seed of that hash."""

    def everything(self) -> "Preparation":
        """The same without sampling."""
        return replace(self, sample_below=None)

    @property
    def shift_D(self) -> np.ndarray | None:
        """The shift as an array."""
        return np.frombuffer(self.shift, dtype=np.float32) if self.shift else None


class Moments(NamedTuple):
    """What must be known before a grid can be chosen."""

    n_rows: int
    max_abs: float


class LastSums(NamedTuple):
    """What the last Lloyd iteration added up."""

    prep: Preparation
    sums_KD: np.ndarray
    counts_K: np.ndarray
    labels: list[np.ndarray]
    """Per block; empty before the first iteration."""


class Share:
    """Blocks of one source and the passes over them."""

    def __init__(self, source: Source, block_rows: int, device: Literal["cpu", "cuda"]) -> None:
        self._source = source
        self._block_rows = block_rows
        self._device = device
        self._rows: list[Block] | None = None
        self._points: tuple[Preparation, list[Block]] | None = None
        self._last_sums: LastSums | None = None

    def moments(self, view: View) -> Moments:
        """Number of rows and greatest coordinate of the view.

        Raises: BadVectors for NaN or infinite rows, and for rows without a direction when the view
            is spherical; the first keys are named.
        """
        n_rows, max_abs = 0, 0.0
        for keys, rows in self._blocks():
            _check_rows(keys, rows, view)
            n_rows += len(keys)
            if not view.spherical and len(rows):
                max_abs = max(max_abs, float(np.abs(points(rows, view)).max()))
        return Moments(n_rows, 1.0 if view.spherical else max_abs)

    def totals(self, prep: Preparation, square_exponent: int) -> tuple[np.ndarray, np.ndarray]:
        """Sum of points, float64 [D], and of their squared lengths, int64 [1] on its own grid."""
        total_D = np.zeros((1, prep.view.width))
        squares = 0
        for _, x in self._prepared(prep):
            add_by_label(x, np.zeros(len(x), dtype=np.int32), total_D)
            lengths = np.einsum("nd,nd->n", x, x, dtype=np.float64)
            squares += fixed_point_sum(lengths, square_exponent)
        return total_D[0], np.array([squares], dtype=np.int64)

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

    def points_below(self, prep: Preparation, seed: int, below: int) -> tuple[np.ndarray, ...]:
        """Hashes uint64 [n] up to `below` and their points float32 [n, D]."""
        hashes, found = [np.empty(0, dtype=np.uint64)], [_no_points(prep)]
        for keys, x in self._prepared(prep):
            block_hashes = hash64(keys, seed)
            chosen = block_hashes <= np.uint64(below)
            hashes.append(block_hashes[chosen])
            found.append(x[chosen])
        return np.concatenate(hashes), np.concatenate(found)

    def lloyd_sums(
        self, prep: Preparation, centroids_KD: np.ndarray, offset_K: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Assign and add: sums float64 [K, D] and counts int64 [K].

        Rows that kept their label since the last call are not added again: exact sums have the
        same bits however they were reached.
        """
        last = self._last_sums
        if last is None or last.prep != prep or last.sums_KD.shape != centroids_KD.shape:
            last = LastSums(prep, *_empty_sums(centroids_KD.shape), [])
        self._last_sums = None
        labels = []
        with one_blas_thread():
            for i, (_, x) in enumerate(self._prepared(prep)):
                labels.append(self._assign(x, centroids_KD, offset_K))
                before = last.labels[i] if last.labels else None
                _move(x, before, labels[-1], last.sums_KD, last.counts_K)
        self._last_sums = last._replace(labels=labels)
        return last.sums_KD.copy(), last.counts_K.copy()

    def label_sums(
        self, prep: Preparation, table: tuple[np.ndarray, np.ndarray], k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add under given labels (sorted keys, labels); rows not in the table are left out."""
        sums, counts = _empty_sums((k, prep.view.width))
        index = KeyIndex(table[0])
        for keys, x in self._prepared(prep):
            labels = lookup(*table, keys, index=index)
            known = labels >= 0
            if known.all():
                _add(x, labels, sums, counts)
            else:
                _add(x[known], labels[known], sums, counts)
        return sums, counts

    def balance_mass(
        self, prep: Preparation, centroids_KD: np.ndarray, offset_K: np.ndarray, epsilon: float
    ) -> tuple[np.ndarray]:
        """Sum over rows of softmax((x c' + offset) / epsilon), float64 [K] on the grid."""
        mass_K = np.zeros((1, len(centroids_KD)))
        with one_blas_thread():
            for _, x in self._prepared(prep):
                blocks = scores_by_block(x, centroids_KD, offset_K, self._block_rows)
                for _, scores in blocks:
                    soft = snap(_softmax(scores, epsilon), POSTERIOR_EXPONENT)
                    add_by_label(soft, np.zeros(len(soft), dtype=np.int32), mass_K)
        return (mass_K[0],)

    def label(
        self, prep: Preparation, centroids_KD: np.ndarray, offset_K: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys uint64, labels int32 and squared distances float32 of all rows."""
        keys, labels = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int32)]
        distances = [np.empty(0, dtype=np.float32)]
        with one_blas_thread():
            for block_keys, x in self._prepared(prep):
                found = self._assign(x, centroids_KD, offset_K)
                keys.append(block_keys)
                labels.append(found)
                distances.append(_squared_distances(x, centroids_KD, found))
        return np.concatenate(keys), np.concatenate(labels), np.concatenate(distances)

    def posterior_sums(
        self,
        prep: Preparation,
        prototypes: tuple[tuple[int, np.ndarray], ...],
        temperature: float,
        table: tuple[np.ndarray, np.ndarray],
    ) -> tuple[np.ndarray]:
        """Posteriors added by label over streams, float64 [K, K] on the grid; rows not in the
        table are left out.

        Args: prototypes: per stream, its first column in the point and its prototypes [K, P].
        """
        k = len(prototypes[0][1])
        sums_KK = np.zeros((k, k))
        index = KeyIndex(table[0])
        with one_blas_thread():
            for keys, x in self._prepared(prep):
                labels = lookup(*table, keys, index=index)
                known = labels >= 0
                if not known.all():
                    x, labels = x[known], labels[known]
                for start, prototypes_KP in prototypes:
                    h = np.ascontiguousarray(x[:, start : start + prototypes_KP.shape[1]])
                    for at, scores in scores_by_block(h, prototypes_KP, None, self._block_rows):
                        soft = snap(_softmax(scores, temperature), POSTERIOR_EXPONENT)
                        add_by_label(soft, labels[at : at + len(soft)], sums_KK)
        return (sums_KK,)

    def _assign(
        self, x_ND: np.ndarray, centroids_KD: np.ndarray, offset_K: np.ndarray | None
    ) -> np.ndarray:
        if self._device == "cuda":
            return assign_cuda(x_ND, centroids_KD, offset_K)
        return assign(x_ND, centroids_KD, offset_K, self._block_rows)

    def _blocks(self) -> Iterator[Block]:
        if self._rows is not None:
            yield from self._rows
            return
        if not self._source.keep_rows:
            yield from self._source.blocks()
            return
        self._rows = list(self._source.blocks())
        yield from self._rows

    def _prepared(self, prep: Preparation) -> Iterator[Block]:
        """Points of the preparation: kept when they are what Lloyd iterates over."""
        if self._points is not None and self._points[0] == prep:
            yield from self._points[1]
            return
        made = (_prepare(block, prep) for block in self._blocks())
        if prep.view.combine == "each" or (
            self._points is not None and self._points[0].everything() == prep
        ):
            # One pass over everything must not evict the sample or double the memory.
            yield from made
            return
        self._points = None
        self._points = (prep, list(made))
        yield from self._points[1]


def _prepare(block: Block, prep: Preparation) -> Block:
    keys, rows = block
    if prep.sample_below is not None:
        chosen = hash64(keys, prep.sample_seed) <= np.uint64(prep.sample_below)
        keys, rows = keys[chosen], rows[chosen]
    x = points(rows, prep.view)
    if prep.shift_D is not None:
        x = x - prep.shift_D
    return Block(keys, snap(x, prep.exponent))


def _check_rows(keys: np.ndarray, rows: np.ndarray, view: View) -> None:
    for start, stop in view.slices:
        part = rows[:, start:stop].astype(np.float32, copy=False)
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            raise _bad(keys[~finite], "NaN or infinite values")
        if view.spherical:
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


def _empty_sums(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(shape), np.zeros(shape[0], dtype=np.int64)


def _add(x: np.ndarray, labels: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
    add_by_label(x, labels, sums)
    counts += np.bincount(labels, minlength=len(counts))


def _move(
    x: np.ndarray,
    before: np.ndarray | None,
    labels: np.ndarray,
    sums: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Bring sums of the labels before up to the labels now."""
    if before is None:
        _add(x, labels, sums, counts)
        return
    moved = np.flatnonzero(before != labels)
    rows = x[moved]
    add_by_label(rows, before[moved], sums, weight=-1.0)
    counts -= np.bincount(before[moved], minlength=len(counts))
    _add(rows, labels[moved], sums, counts)


def _no_points(prep: Preparation) -> np.ndarray:
    return np.empty((0, prep.view.width), dtype=np.float32)
