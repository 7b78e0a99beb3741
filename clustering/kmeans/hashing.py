"""hash64: placement and sampling of rows by the hash of their key, splitmix64.

Pure numpy. Invariant: the hash of a key depends on the key and the seed alone, so a row's virtual
shard, and whether it is in a sample, never depend on who holds it. For one seed the hash is a
bijection: distinct keys have distinct hashes.
"""

import numpy as np

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: odd, and its multiples spread evenly over 64 bits."""


def hash64(keys: np.ndarray, seed: int = 0) -> np.ndarray:
    """64-bit hash of unsigned keys (splitmix64 finaliser, Steele et al. 2014)."""
    start = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    with np.errstate(over="ignore"):
        value = keys.astype(np.uint64) ^ (_finish(start + GOLDEN) if seed else np.uint64(0))
        return _finish(value + GOLDEN)


def _finish(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * _MIX[0]
    value = (value ^ (value >> np.uint64(27))) * _MIX[1]
    return np.asarray(value ^ (value >> np.uint64(31)))


def vshard_of(keys: np.ndarray, vshards: int) -> np.ndarray:
    """Virtual shard of each key, int64 in 0..vshards-1."""
    return (hash64(keys) % np.uint64(vshards)).astype(np.int64)
