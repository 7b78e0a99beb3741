"""Rounds: the protocol between training and clustering: push features, ask for rounds, get labels.

Types only; rounds.local (one process) and pool (Ray actors) keep it with the same bits. Invariant:
a round that is `ok` labels every row that was frozen for it; where labels are given
(clustering.rounds.given), every row that has one.

Shapes: B clips of a batch, N clips of a round, K clusters, W width of a bank row, P of a stream.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from clustering.kmeans.label_table import NO_LABEL, KeyIndex, LabelTable


@dataclass(frozen=True)
class RoundRequest:
    """What a round is made of and when its labels apply."""

    round: int
    """1, 2, 3, ..."""
    step: int
    """Rows pushed at this step or before take part; later ones do not, however late the freeze."""
    effective_step: int
    """Training step from which all ranks use the labels."""
    cold: bool = False
    """Start anew instead of from the labels of the round before."""
    posterior_temperature: float = field(kw_only=True)
    """tau_c of the posteriors behind `confusion_KK`."""
    expected_rows: int = 0
    """Rows there should be, for the coverage; 0: unknown, coverage is 1."""


@dataclass(frozen=True)
class HeadLabels:
    """One clustering of a round."""

    name: str
    teaches: tuple[str, ...]
    """Streams that learn from this clustering."""
    keys_N: np.ndarray
    """uint64, sorted."""
    labels_N: np.ndarray
    """int32 in 0..K-1."""
    prototypes: dict[str, np.ndarray]
    """Per stream, normalised mean of h_s over a cluster, float32 [K, P]; an empty cluster, or one
    whose rows cancel, has a prototype of zeros."""
    confusion_KK: np.ndarray
    """float32: mean posterior softmax(h_s M^s' / tau_c) of the clips of each class, over the
    streams it teaches; rows sum to 1. An empty class is confused with nobody: identity row."""

    @property
    def table(self) -> LabelTable:
        """Its labels by key."""
        return LabelTable(self.keys_N, self.labels_N)

    def lookup(self, keys_B: np.ndarray, default: int = NO_LABEL) -> np.ndarray:
        """Labels of clips, int32 [B]; `default` where the round did not see the clip."""
        return self.table.lookup(keys_B, default, self._index)

    @functools.cached_property
    def _index(self) -> KeyIndex:
        return KeyIndex(self.keys_N)

    def __getstate__(self) -> dict[str, object]:
        """Without the index, which is quicker made than sent."""
        return {name: value for name, value in self.__dict__.items() if name != "_index"}


@dataclass(frozen=True)
class PublishedRound:
    """A finished round: all its labels, or the reason why there are none."""

    round: int
    effective_step: int
    ok: bool
    reason: str
    """Empty, or why the round is withheld (collapse guard, missing labels)."""
    heads: list[HeadLabels]
    """Empty if the round is withheld."""
    health: dict[str, float]
    """inertia, iterations, n_empty, size_min, size_max, effective_clusters, churn, coverage,
    age_mean, mean_cosine, seconds; for several heads the worst, and `<head>/<key>` for each."""


class BankStats(NamedTuple):
    """State of the feature bank."""

    rows: int
    """Clips with a row."""
    age_mean: float
    """Mean of (newest step - step of the row)."""
    age_max: int
    bytes: int


class Rounds(Protocol):
    """Feature bank and clustering as a training worker sees them."""

    def push(self, keys_B: np.ndarray, features_BW: np.ndarray, step: int) -> None:
        """Hand over rows [stream 1; stream 2; ...] float16; the newest row of a clip counts.

        Never waits for more than 5 ms: rows go out in the background, and the oldest are dropped
        and counted when the bank cannot keep up.
        Raises: BadVectors, naming the clips, for NaN or infinite values, for a stream of zeros and
            for another width than the bank's; nothing of the batch is then taken.
        """
        ...

    def flush(self, timeout_s: float) -> None:
        """Return when all pushed rows are in the bank and survive its restart.

        Raises: RoundTimeout.
        """
        ...

    def start(self, request: RoundRequest) -> None:
        """Freeze the bank and cluster in the background; returns at once.

        One rank calls it, after all ranks have flushed. A request equal to one that is already on
        storage (a resumed run) continues that round instead of making it again.
        """
        ...

    def wait(self, round: int, timeout_s: float) -> PublishedRound:
        """The finished round. Raises: RoundTimeout; ClusteringError if the round failed."""
        ...

    def save(self, uri: str) -> None:
        """Make the rows of the bank a saved state: a folder `bank-*` in the rounds' own folder.

        A pool writes what was pushed since the last time, and names the rest.
        """
        ...

    def forget_saved(self, keep: int) -> None:
        """Remove all but the newest `keep` saved states, and rows that only they named."""
        ...

    def forget_later(self, step: int) -> None:
        """Remove the saved states of steps after `step`, from which a run goes on.

        Their checkpoints were lost; as the newest ones they would outlive those that count.
        """
        ...

    def restore(self, uri: str) -> None:
        """Replace the rows of the bank by saved ones."""
        ...

    @property
    def dropped(self) -> int:
        """Rows this worker gave up because the bank was slow. Known here: the bank is not asked."""
        ...

    def stats(self) -> BankStats:
        """State of the bank, which reads all its rows for the answer."""
        ...
