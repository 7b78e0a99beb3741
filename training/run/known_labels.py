"""known_labels: labels that no clustering finds: seeds it starts from, and controls beside it.

Reads no clip. Invariant: the labels are all that differs; they go through the same prototypes,
confusion, guard and losses as those of a clustering.

Shapes: N clips of the train split, K clusters, C classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clustering.kmeans.label_table import LabelTable
from clustering.rounds.given import Given
from training.config import RoundsConfig
from training.data.rows import RowIndex, few_of_each_class, with_labels
from training.errors import TrainingError
from training.evaluation.results import read_confusion


class Known(NamedTuple):
    """Labels of clips of the train split, and how many there are to choose from."""

    k: int
    given: Given


def known_labels(config: RoundsConfig, index: RowIndex, k: int, seed: int) -> Known | None:
    """The labels of `rounds.labels` = seeded, random or true; None where none is known.

    Classes are numbered in their order among those that a label of the train split names.
    `random`: one of `k`, drawn once for each clip, or each of the few whose label would be used,
    and kept from round to round.
    Raises: TrainingError if the train split has no classes to take, for a key that goes with other
        labels, or as `_corrupted`.
    """
    labels = config.labels
    _refuse_idle_keys(config)
    if labels in ("clusters", "none"):
        return None
    if labels == "random" and config.labels_per_class is None:
        return Known(k, Given(_by_chance(index.keys_N, k, seed)))
    table = _of_the_store(config, index)
    if labels == "random":
        return Known(k, Given(_by_chance(table.keys_N, k, seed)))
    classes_C = np.unique(table.labels_N)
    if config.label_noise > 0:
        table = _corrupted(config, index.classes, table, seed=seed)
        classes_C = np.union1d(classes_C, table.labels_N)
    # Only those: a class of other splits would be a prototype of zeros, which all are pushed away
    # from, and one that nobody is confused with, which makes the mean degree smaller.
    numbered_N = np.searchsorted(classes_C, table.labels_N).astype(np.int32)
    seeds = labels == "seeded"
    return Known(len(classes_C), Given(LabelTable(table.keys_N, numbered_N), seeds=seeds))


def _by_chance(keys_N: NDArray[np.uint64], k: int, seed: int) -> LabelTable:
    drawn_N = np.random.default_rng([seed, k]).integers(0, k, len(keys_N)).astype(np.int32)
    # By key, so that they do not hang on the order of rows in the store.
    return LabelTable(np.sort(keys_N), drawn_N)


def _of_the_store(config: RoundsConfig, index: RowIndex) -> LabelTable:
    """The classes of the clips that have one, of few of them if so asked."""
    known = with_labels(index, f"rounds.labels = {config.labels}")
    keys_N, own_N = known.keys_N, known.labels_N.astype(np.int32)
    if config.labels_per_class is not None:
        few = few_of_each_class(own_N, config.labels_per_class)
        keys_N, own_N = keys_N[few], own_N[few]
    return LabelTable(keys_N, own_N)


def _refuse_idle_keys(config: RoundsConfig) -> None:
    """A key that would do nothing was meant to do something. Raises: TrainingError.

    But `labels_per_class` beside `none`: the variant of an ablation that learns from no label; and
    `label_noise_from` beside no noise: the first point of a sweep.
    """
    if config.label_noise > 0 and config.labels != "true":
        raise TrainingError(
            f"rounds.label_noise = {config.label_noise} corrupts true labels, but rounds.labels = "
            f"{config.labels}; set it to true, or rounds.label_noise to 0"
        )
    if config.labels_per_class is not None and config.labels == "clusters":
        raise TrainingError(
            f"rounds.labels_per_class = {config.labels_per_class}, but rounds.labels = clusters, "
            "which looks at no label; set it to true or seeded, or leave the other out"
        )


def _corrupted(
    config: RoundsConfig,
    classes: Sequence[str],
    table: LabelTable,
    *,
    seed: int,
) -> LabelTable:
    """Keys, sorted, and labels of which a share is wrong.

    A larger share is wrong for the clips of a smaller one too, and with the same classes, so that
    points of a curve of one seed differ by the share alone.
    Raises: TrainingError if the confusion cannot be read, or is that of other classes.
    """
    order = np.argsort(table.keys_N)
    keys_N, labels_N = table.keys_N[order], table.labels_N[order]
    wrong_CC = _wrong_classes(config.label_noise_from, classes)
    draws = np.random.default_rng([seed, 0xBAD]).random((2, len(keys_N)))
    edges_CC = np.cumsum(wrong_CC, axis=1)
    edges_CC[:, -1] = 1.0  # Else rounding leaves a gap above the last one.
    drawn_N = (draws[1][:, None] >= edges_CC[labels_N]).sum(axis=1)
    changed_N = draws[0] < config.label_noise
    return LabelTable(keys_N, np.where(changed_N, drawn_N, labels_N).astype(np.int32))


def _wrong_classes(file: str | None, classes: Sequence[str]) -> NDArray[np.float64]:
    """How often a clip of a class (row) is given each other one; rows sum to 1, diagonal 0."""
    n = len(classes)
    if n < 2:
        raise TrainingError(f"rounds.label_noise needs two classes or more, the store has {n}")
    counts_CC = np.zeros((n, n))
    if file is not None:
        try:
            found = read_confusion(Path(file))
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(
                f"rounds.label_noise_from = {file}: not the confusion.npz of an evaluation: {error}"
            ) from None
        if found.classes != list(classes):
            raise TrainingError(
                f"rounds.label_noise_from = {file}: confusion of {len(found.classes)} classes that "
                f"are not the {n} of this store; take that of a run on the same classes"
            )
        counts_CC = found.main.astype(np.float64)
    np.fill_diagonal(counts_CC, 0.0)
    # A class that was never taken for another: any of them.
    counts_CC[counts_CC.sum(axis=1) == 0] = 1.0
    np.fill_diagonal(counts_CC, 0.0)
    shares_CC: NDArray[np.float64] = counts_CC / counts_CC.sum(axis=1, keepdims=True)
    return shares_CC
