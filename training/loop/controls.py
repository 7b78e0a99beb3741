"""control_labels: labels given instead of clusters, which pseudo-labels are measured against.

Pure numpy. Invariant: the labels are all that differs; they go through the same prototypes,
confusion, guard and losses as those of a clustering.

Shapes: N clips of the train split, K clusters, C classes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.data.rows import RowIndex
from training.errors import TrainingError


class Control(NamedTuple):
    """A labelling of the train split."""

    k: int
    """Number of labels."""
    keys_N: NDArray[np.uint64]
    """uint64, of the clips that have a label."""
    labels_N: NDArray[np.int32]
    """int32 in 0..k-1."""


def control_labels(labels: str, index: RowIndex, k: int, seed: int) -> Control | None:
    """The labels of `rounds.labels` = random or true; None where they are clustered.

    `random`: one of `k`, drawn once for each clip and kept from round to round.
    Raises: TrainingError if the train split has no classes to take.
    """
    if labels == "random":
        drawn_N = np.random.default_rng([seed, k]).integers(0, k, len(index)).astype(np.int32)
        # By key, so that they do not hang on the order of rows in the store.
        return Control(k, np.sort(index.keys_N), drawn_N)
    if labels == "true":
        known_N = index.labels_N >= 0
        if not known_N.any():
            raise TrainingError(
                "rounds.labels = true, but no clip of the train split has a label; ingest a list "
                "with labels, or take clusters"
            )
        return Control(
            len(index.classes), index.keys_N[known_N], index.labels_N[known_N].astype(np.int32)
        )
    return None
