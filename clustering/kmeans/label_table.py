"""LabelTable: sorted keys and their labels, and the search of keys in it.

Pure numpy; knows nothing of who made the labels. Invariant: a key is found or it is not; keys of
which the table knows nothing get a default that losses ignore.

Shapes: N rows of the table, B keys asked for.
"""

from typing import NamedTuple

import numpy as np

NO_LABEL = -100
"""Label of a row that has none: what PyTorch's cross-entropy ignores by default."""

_STRIDE = 256


class KeyIndex:
    """Finds keys in a large sorted table without waiting for memory at every step of the search.

    Every 256th key fits the processor's cache and is searched one key after the other; the steps
    between them are made for all keys at once, so that their cache misses overlap: three times as
    fast as `np.searchsorted` for a batch in ten million keys.
    """

    def __init__(self, keys_N: np.ndarray) -> None:
        self._keys_N = keys_N
        self._coarse = keys_N[::_STRIDE].copy()

    def find(self, keys_B: np.ndarray) -> np.ndarray:
        """Position int64 [B] of the greatest key that is not above each key; 0 if there is none."""
        position = np.searchsorted(self._coarse, keys_B, side="right") - 1
        np.maximum(position, 0, out=position)
        position *= _STRIDE
        step = _STRIDE // 2
        while step:
            ahead = np.minimum(position + step, len(self._keys_N) - 1)
            position = np.where(self._keys_N[ahead] <= keys_B, ahead, position)
            step //= 2
        return position


class LabelTable(NamedTuple):
    """Labels by key."""

    keys_N: np.ndarray
    """uint64, sorted, distinct."""
    labels_N: np.ndarray
    """int32."""

    def lookup(
        self, keys_B: np.ndarray, default: int = NO_LABEL, index: KeyIndex | None = None
    ) -> np.ndarray:
        """Labels int32 [B]; `default` for a key that is not here.

        Args: index: over `keys_N`, for somebody who looks up many times.
        """
        if len(self.keys_N) == 0:
            return np.full(len(keys_B), default, dtype=np.int32)
        keys = np.asarray(keys_B, dtype=np.uint64)
        position = (index or KeyIndex(self.keys_N)).find(keys)
        labels = self.labels_N[position].astype(np.int32, copy=False)
        return np.where(self.keys_N[position] == keys, labels, np.int32(default))
