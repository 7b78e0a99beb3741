"""A label table: sorted keys and their labels.

Pure numpy. Invariant: a key is found or it is not; keys of which the round knew nothing get the
default, which losses ignore.
"""

import numpy as np

UNLABELLED = -100
"""Label of a row that has none; cross-entropy ignores it by default."""


def lookup(
    keys_N: np.ndarray, labels_N: np.ndarray, keys_B: np.ndarray, default: int = UNLABELLED
) -> np.ndarray:
    """Labels int32 [B] of keys in a table of sorted keys; `default` where a key is not in it."""
    if len(keys_N) == 0:
        return np.full(len(keys_B), default, dtype=np.int32)
    keys = np.asarray(keys_B, dtype=np.uint64)
    position = np.minimum(np.searchsorted(keys_N, keys), len(keys_N) - 1)
    labels = labels_N[position].astype(np.int32, copy=False)
    return np.where(keys_N[position] == keys, labels, np.int32(default))
