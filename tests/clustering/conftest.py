"""Planted mixtures, rows in many shares without Ray, digests that say whether bits are equal."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from clustering.kmeans.passes import Passes, merge
from clustering.kmeans.share import RowBlock, Share, Sums
from clustering.rounds.protocol import PublishedRound, Rounds

WIDTH = 32
STREAMS = {"audio": WIDTH, "video": WIDTH, "fusion": WIDTH}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Mixture(NamedTuple):
    x: np.ndarray
    truth: np.ndarray
    centers: np.ndarray
    keys: np.ndarray


@pytest.fixture(scope="session")
def mixture() -> Callable[..., Mixture]:
    """Make a planted mixture; sizes are unequal, noise is the length of the noise vector."""

    def make(
        n: int = 3000, k: int = 12, width: int = WIDTH, noise: float = 0.5, seed: int = 0
    ) -> Mixture:
        rng = np.random.default_rng(seed)
        centers = unit(rng.normal(size=(k, width)))
        share = rng.uniform(1, 3, size=k)
        truth = rng.choice(k, size=n, p=share / share.sum())
        x = centers[truth] + rng.normal(size=(n, width)) * noise / np.sqrt(width)
        keys = rng.choice(2**60, size=n, replace=False).astype(np.uint64)
        return Mixture(unit(x).astype(np.float32), truth, centers.astype(np.float32), keys)

    return make


class Features(NamedTuple):
    keys: np.ndarray
    rows: np.ndarray
    truth: np.ndarray


@pytest.fixture(scope="session")
def features() -> Callable[..., Features]:
    """Make bank rows [audio; video; fusion] float16 of clips with planted classes."""

    def make(
        n: int = 1500, k: int = 8, noise: float = 0.5, seed: int = 0, drift: int = 0
    ) -> Features:
        rng = np.random.default_rng(seed)
        truth = rng.integers(k, size=n)
        keys = rng.choice(2**60, size=n, replace=False).astype(np.uint64)
        centers = [unit(rng.normal(size=(k, WIDTH))) for _ in STREAMS]
        noise_rng = np.random.default_rng((seed, drift))
        slices = [
            unit(c[truth] + noise_rng.normal(size=(n, WIDTH)) * noise / np.sqrt(WIDTH))
            for c in centers
        ]
        return Features(keys, np.concatenate(slices, axis=1).astype(np.float16), truth)

    return make


class BlockSource:
    """Blocks in memory."""

    keep_rows = True

    def __init__(self, name: str, blocks: list[RowBlock]) -> None:
        self.token, self._blocks = name, blocks

    def blocks(self) -> Any:
        return iter(self._blocks)


class ManyShares(Passes):
    """Shares in one process whose partial sums are added in a given random order."""

    def __init__(self, shares: list[Share], seed: int, dtype: type = np.float64) -> None:
        self._shares = shares
        self._rng = np.random.default_rng(seed)
        self._dtype = dtype

    def gather(self, method: Callable[..., Any], *args: Any) -> list[Any]:
        return [method(share, *args) for share in self._shares]

    def reduce(self, method: Callable[..., Sums], *args: Any) -> Sums:
        parts = self.gather(method, *args)
        if self._dtype is not np.float64:
            parts = [Sums(*(np.asarray(a, dtype=self._dtype) for a in part)) for part in parts]
        return merge([parts[i] for i in self._rng.permutation(len(parts))])


@pytest.fixture(scope="session")
def many_shares() -> Callable[..., ManyShares]:
    """Spread rows over shares: fixed blocks (as virtual shards), any number of holders."""

    def make(
        keys: np.ndarray, x: np.ndarray, count: int, seed: int, dtype: type = np.float64
    ) -> ManyShares:
        blocks = []
        for v in range(16):
            mine = np.flatnonzero(keys % np.uint64(16) == v)
            mine = mine[np.argsort(keys[mine])]
            blocks.append(RowBlock(keys[mine], x[mine]))
        order = np.random.default_rng(seed).permutation(16)
        shares = [
            Share(BlockSource(f"{i}/{count}", [blocks[v] for v in order[i::count]]), 256, "cpu")
            for i in range(count)
        ]
        return ManyShares(shares, seed, dtype)

    return make


@pytest.fixture(scope="session")
def round_digest() -> Callable[[PublishedRound], str]:
    """SHA-256 of everything in a round but the seconds it took."""

    def digest(published: PublishedRound) -> str:
        sha = hashlib.sha256()
        for head in published.heads:
            arrays = [head.keys_N, head.labels_N, head.confusion_KK]
            arrays += [head.prototypes[stream] for stream in sorted(head.prototypes)]
            for array in arrays:
                sha.update(np.ascontiguousarray(array).tobytes())
            sha.update(repr((head.name, head.teaches)).encode())
        health = {k: v for k, v in sorted(published.health.items()) if k != "seconds"}
        sha.update(repr((published.ok, published.reason, health)).encode())
        return sha.hexdigest()

    return digest


@pytest.fixture(scope="session")
def push_all() -> Callable[..., None]:
    """Push rows in batches of a random order."""

    def push(rounds: Rounds, data: Features, step: int, seed: int = 0, batch: int = 64) -> None:
        order = np.random.default_rng(seed).permutation(len(data.keys))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            rounds.push(data.keys[chosen], data.rows[chosen], step)

    return push


@pytest.fixture(scope="session")
def streams() -> dict[str, int]:
    return dict(STREAMS)
