"""How well the labels of a round agree with the true ones; for the reader, never for training.

Pure numpy. Invariant: only clips that have both labels count.

Shapes: N clips of a round.
"""

from dataclasses import replace

import numpy as np

from clustering.kmeans.label_table import LabelTable
from clustering.rounds.health import agreement
from clustering.rounds.protocol import PublishedRound


def truths_of(clip_of: dict[int, tuple[str, str]]) -> LabelTable:
    """The true class of each clip that has one.

    Args: clip_of: clip id and true label ("" if none) by clustering key.
    """
    known = {key: label for key, (_, label) in clip_of.items() if label}
    number = {label: k for k, label in enumerate(sorted(set(known.values())))}
    keys = np.fromiter(known, np.uint64, len(known))
    classes = np.fromiter((number[label] for label in known.values()), np.int32, len(known))
    order = np.argsort(keys)
    return LabelTable(keys[order], classes[order])


def with_agreement(done: PublishedRound, truths: LabelTable) -> PublishedRound:
    """The round, its health with the agreement of its first head where labels are known."""
    if not done.heads:
        return done
    first = done.heads[0]
    truth_N = truths.lookup(first.keys_N)
    if not ((truth_N >= 0) & (first.labels_N >= 0)).any():
        return done
    return replace(done, health={**done.health, **agreement(first.labels_N, truth_N)})
