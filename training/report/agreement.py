"""How well the labels of a round agree with the true ones; for the reader, never for training.

Pure numpy. Invariant: only clips that have both labels count.

Shapes: N clips of a round, A clips of the store.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clustering.kmeans.label_table import NO_LABEL
from clustering.rounds.health import agreement
from clustering.rounds.protocol import PublishedRound


class Truths(NamedTuple):
    """The true class of each clip that has one, by clustering key.

    Looked up at once for all clips of a round: one by one, thirty rounds of VGGSound take 40 s.
    """

    keys_A: NDArray[np.uint64]
    """Sorted."""
    classes_A: NDArray[np.int32]

    def of(self, keys_N: NDArray[np.uint64]) -> NDArray[np.int32]:
        """The class of each clip, -1 if it is not known."""
        if not len(self.keys_A):
            return np.full(len(keys_N), -1, np.int32)
        at_N = np.minimum(np.searchsorted(self.keys_A, keys_N), len(self.keys_A) - 1)
        return np.where(self.keys_A[at_N] == keys_N, self.classes_A[at_N], np.int32(-1))


def truths_of(clip_of: dict[int, tuple[str, str]]) -> Truths:
    """Args: clip_of: clip id and true label ("" if none) by clustering key."""
    known = {key: label for key, (_, label) in clip_of.items() if label}
    number = {label: k for k, label in enumerate(sorted(set(known.values())))}
    keys = np.fromiter(known, np.uint64, len(known))
    classes = np.fromiter((number[label] for label in known.values()), np.int32, len(known))
    order = np.argsort(keys)
    return Truths(keys[order], classes[order])


def with_agreement(done: PublishedRound, truths: Truths) -> PublishedRound:
    """The round, its health with the agreement of its first head where labels are known."""
    if not done.heads:
        return done
    labels_N = done.heads[0].labels_N
    truth_N = truths.of(done.heads[0].keys_N)
    known = (truth_N >= 0) & (labels_N != NO_LABEL)
    if not known.any():
        return done
    return replace(done, health={**done.health, **agreement(labels_N[known], truth_N[known])})
