"""split_validation: which clips of the train split are kept out of training.

Pure but for reading a snapshot. Invariant: no group (the video a clip was cut from) is on both
sides, and no class is held out whole; the choice hangs on names and labels alone, not on the order
of rows, so that it is the same in every process of a run.

Shapes: N clips, G groups.
"""

import logging

import numpy as np
from numpy.typing import NDArray

from pipeline.source.entry import group_of
from pipeline.store.store import Snapshot
from training.data.rows import RowIndex, clip_keys
from training.errors import TrainingError

log = logging.getLogger(__name__)

_MOST_PASSES = 10
"""Over the classes: a group of several classes that changes sides may leave another class short."""


def groups_of(snapshot: Snapshot, split: str) -> NDArray[np.object_]:
    """The group of each row of `index_rows(snapshot, split)`; [N] of str.

    Rows older than the column count by the YouTube id in the clip id, or each for itself.
    """
    rows = snapshot.rows(split)
    pairs = zip(rows["group"].to_pylist(), rows["clip_id"].to_pylist(), strict=True)
    groups = [group or group_of(clip_id, clip_id) for group, clip_id in pairs]
    return np.array(groups, dtype=object)


def split_validation(
    index: RowIndex, groups_N: NDArray[np.object_], frac: float
) -> tuple[RowIndex, RowIndex]:
    """Train and validation rows: about `frac` of the groups, at least one of each class that has
    two, and never the last one of a class.

    Raises: TrainingError if no class can be on both sides.
    """
    names_G, group_N = np.unique(groups_N, return_inverse=True)
    draw_G = clip_keys([f"validation:{name}" for name in names_G]).astype(np.float64) / 2.0**64
    held_G = draw_G < frac
    rows, places = np.nonzero(index.labels_NL >= 0)
    pairs = np.unique(np.stack([index.labels_NL[rows, places], group_N[rows]]), axis=1)
    starts = np.flatnonzero(np.diff(pairs[0])) + 1
    of_class = dict(zip(np.unique(pairs[0]).tolist(), np.split(pairs[1], starts), strict=False))
    for _ in range(_MOST_PASSES):
        before_G = held_G.copy()
        for groups in of_class.values():
            _give_both_sides(groups, draw_G, held_G)
        if (before_G == held_G).all():
            break
    _check_classes(index, of_class, names_G, held_G)
    held_N = held_G[group_N]
    return index.take(~held_N), index.take(held_N)


def _give_both_sides(
    groups: NDArray[np.intp], draw_G: NDArray[np.float64], held_G: NDArray[np.bool_]
) -> None:
    """Move the group of a class that is nearest to the other side there, if none is there."""
    held = held_G[groups]
    if held.all():
        held_G[groups[draw_G[groups].argmax()]] = False
    elif not held.any() and len(groups) > 1:
        held_G[groups[draw_G[groups].argmin()]] = True


def _check_classes(
    index: RowIndex,
    of_class: dict[int, NDArray[np.intp]],
    names_G: NDArray[np.object_],
    held_G: NDArray[np.bool_],
) -> None:
    """Raises: TrainingError."""
    if not of_class:
        return
    whole = [c for c, groups in of_class.items() if held_G[groups].all()]
    undivided = [c for c, groups in of_class.items() if not held_G[groups].any()]
    if whole or len(undivided) == len(of_class):
        label = (whole or undivided)[0]
        raise TrainingError(
            f"data.validation_frac: {'class' if whole else 'no class could be divided:'} "
            f"{index.classes[label]!r} has all its clips in group {names_G[of_class[label][0]]!r}"
            f"{', which would be held out whole' if whole else ''}. Give the manifest a column "
            "group that names the recording of each clip, or set data.validation_frac to 0."
        )
    if undivided:
        log.warning(
            "validation holds no clip of %d classes of a single group, such as %r",
            len(undivided),
            index.classes[undivided[0]],
        )
