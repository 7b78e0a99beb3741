"""How well the labels of a round agree with the true ones; for the reader, never for training.

Pure numpy. Invariant: only clips that have both labels count.

Shapes: N clips of a round.
"""

from dataclasses import replace

import numpy as np

from clustering.kmeans.label_table import NO_LABEL
from clustering.rounds.health import agreement
from clustering.rounds.protocol import PublishedRound


def with_agreement(done: PublishedRound, clip_of: dict[int, tuple[str, str]]) -> PublishedRound:
    """The round, its health with the agreement of its first head where labels are known.

    Args: clip_of: clip id and true label ("" if none) by clustering key.
    """
    if not done.heads:
        return done
    keys_N, labels_N = done.heads[0].keys_N, done.heads[0].labels_N
    truths = [clip_of.get(int(key), ("", ""))[1] for key in keys_N]
    known = np.array([bool(t) for t in truths], dtype=bool) & (labels_N != NO_LABEL)
    if not known.any():
        return done
    names = np.array(truths, dtype=str)[known]
    _, truth_N = np.unique(names, return_inverse=True)
    return replace(done, health={**done.health, **agreement(labels_N[known], truth_N)})
