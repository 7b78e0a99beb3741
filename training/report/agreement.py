"""How well the labels of a round agree with the true ones; for the reader, never for training.

Pure numpy. Invariant: only clips that have both labels count.

Shapes: N clips of a round.
"""

import numpy as np

from clustering.rounds.health import agreement
from training.report.folder import Round

UNLABELLED = -100


def with_agreement(done: Round, clip_of: dict[int, tuple[str, str]]) -> Round:
    """The round, its health with nmi, purity and hungarian_accuracy where labels are known.

    Args: clip_of: clip id and true label ("" if none) by clustering key.
    """
    truths = [clip_of.get(int(key), ("", ""))[1] for key in done.keys_N]
    known = np.array([bool(t) for t in truths], dtype=bool) & (done.labels_N != UNLABELLED)
    if not known.any():
        return done
    names = np.array(truths, dtype=str)[known]
    _, truth_N = np.unique(names, return_inverse=True)
    return done._replace(health={**done.health, **agreement(done.labels_N[known], truth_N)})
