"""Whether batches are the same, bit by bit."""

from collections.abc import Sequence

import numpy as np

from training.data.reader import Batch


def same_batch(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def same_batches(found: Sequence[Batch], expected: Sequence[Batch]) -> bool:
    return len(found) == len(expected) and all(map(same_batch, found, expected))
