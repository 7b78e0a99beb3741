"""RoundMaker: from frozen rows to a published round: cluster, prototypes, confusion, health.

Knows nothing of Ray or of who holds the rows (`Passes` does). Invariant: labels, prototypes,
confusion and health (but for the seconds) are a function of frozen rows, round before, config, seed
and, where labels are given, of them.

Shapes: N rows, K clusters, P width of a stream.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from clustering import storage
from clustering.config import KMeansConfig
from clustering.errors import MissingLabels
from clustering.kmeans.checkpoint import StateFile
from clustering.kmeans.exact import grid_exponent
from clustering.kmeans.label_table import LabelTable
from clustering.kmeans.lloyd import Clustering, cluster
from clustering.kmeans.passes import Passes
from clustering.kmeans.share import PointRule
from clustering.kmeans.space import unit_rows
from clustering.rounds.files import begin, publish, round_before, round_uri, unfinished, vectors_uri
from clustering.rounds.frozen import FrozenRows
from clustering.rounds.given import Given, GivenLabels, check_given, digest, label_as_given
from clustering.rounds.health import churn, effective_clusters, merge_health, withheld_because
from clustering.rounds.protocol import HeadLabels, PublishedRound, RoundRequest
from clustering.rounds.targets import Target, each_stream, stream_slices, targets_of

Labelled = Clustering | GivenLabels


class RoundMaker:
    """Makes the rounds of one run, one after the other, under one URI."""

    def __init__(
        self,
        config: KMeansConfig,
        streams: Mapping[str, int],
        uri: str,
        seed: int,
        given: Given | None = None,
        *,
        may_write: storage.MayWrite = storage.always,
    ) -> None:
        """Args: may_write: raises where another driver has taken over; called before each file."""
        self.may_write = may_write
        self.config, self.streams, self.uri = config, dict(streams), uri
        self._seed = seed
        self._targets = targets_of(config, streams)
        self._given = given if given is None else check_given(given, config.k)
        # What two makers of one round must share for a restart to go on with it.
        self.identity: dict[str, Any] = {
            "config": config.model_dump(mode="json"),
            "streams": self.streams,
            "seed": seed,
        }
        if given is not None:
            self.identity["given"] = digest(given)
        if given is not None and not given.seeds:
            # All streams learn the same labels: one head, measured in the space of the first.
            self._targets = [Target("given", self._targets[0].space, 0, tuple(streams))]

    def begin(self, request: RoundRequest) -> None:
        """Note that a round was asked for, so that a restart goes on with it."""
        self.may_write()
        begin(self.uri, request, self.identity)

    def unfinished(self) -> list[RoundRequest]:
        """Rounds of this run that were begun and never completed."""
        return unfinished(self.uri, self.identity)

    def frozen(self, round: int) -> FrozenRows | None:
        """The rows of a round, or None before they are frozen."""
        return FrozenRows.load(vectors_uri(self.uri, round))

    def resumable(self, round: int) -> RoundRequest | None:
        """The request of a round that an earlier process froze and did not finish."""
        if self.frozen(round) is None:
            return None
        return next((request for request in self.unfinished() if request.round == round), None)

    def make(self, passes: Passes, frozen: FrozenRows, request: RoundRequest) -> PublishedRound:
        """Cluster the rows and publish the round, or withhold it with its reason.

        Raises: BadVectors if the rows cannot be clustered at all.
        """
        started = time.perf_counter()
        before = round_before(self.uri, request.round)
        heads: list[HeadLabels] = []
        health: dict[str, dict[str, float]] = {}
        reason = ""
        try:
            for target in self._targets:
                old = _head_named(before, target.name)
                labelled = self._labelled(passes, target, request, old)
                health[target.name] = _health(labelled, old)
                heads.append(self._head(passes, frozen.n_rows, target, labelled, request))
        except MissingLabels as error:
            reason = f"missing labels: {error}"
        merged = merge_health(health) if health else {}
        merged.update(_bank_health(frozen, request), seconds=time.perf_counter() - started)
        if not reason:
            reasons = (
                withheld_because({**merged, **own}, self.config.k, self.config.guard)
                for own in health.values()
            )
            reason = next(filter(None, reasons), "")
        published = PublishedRound(
            round=request.round,
            effective_step=request.effective_step,
            ok=not reason,
            reason=reason,
            heads=[] if reason else heads,
            health=merged,
        )
        self.may_write()
        publish(self.uri, published)
        storage.remove(self._states_uri(request.round))
        return published

    def _labelled(
        self, passes: Passes, target: Target, request: RoundRequest, old: HeadLabels | None
    ) -> Labelled:
        given = self._given
        if given is not None and not given.seeds:
            return label_as_given(passes, target.space, self.config, self._seed, given.table)
        # Heads and rounds draw apart; the mask makes a negative seed a seed, too.
        entropy = [self._seed & 0xFFFFFFFFFFFFFFFF, target.head, request.round]
        state = storage.join(self._states_uri(request.round), f"{target.name}.npz")
        return cluster(
            passes,
            target.space,
            self.config,
            int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]),
            warm=old.table if old is not None and not request.cold else None,
            seeds=None if given is None else given.table,
            checkpoint=StateFile(state, self.may_write),
        )

    def _head(
        self,
        passes: Passes,
        n_rows: int,
        target: Target,
        labelled: Labelled,
        request: RoundRequest,
    ) -> HeadLabels:
        """Prototypes and confusion of one clustering, from exact sums over the frozen rows."""
        k = self.config.k
        table = passes.share_out(LabelTable(labelled.keys_N, labelled.labels_N))
        rule = PointRule(each_stream(self.streams), grid_exponent(1.0, n_rows))
        sums_KW = passes.label_sums(rule, table, k).sums
        slices = stream_slices(self.streams)
        prototypes = {
            name: unit_rows(sums_KW[:, start:stop]).astype(np.float32)
            for name, (start, stop) in slices.items()
        }
        teaching = tuple((slices[name][0], prototypes[name]) for name in target.teaches)
        confusion_KK = passes.posterior_sums(rule, teaching, request.posterior_temperature, table)
        totals_K1 = confusion_KK.sum(axis=1, keepdims=True)
        confusion_KK = np.where(
            totals_K1 > 0, confusion_KK / np.where(totals_K1 > 0, totals_K1, 1), np.eye(k)
        )
        return HeadLabels(
            name=target.name,
            teaches=target.teaches,
            keys_N=labelled.keys_N,
            labels_N=labelled.labels_N,
            prototypes=prototypes,
            confusion_KK=confusion_KK.astype(np.float32),
        )

    def _states_uri(self, round: int) -> str:
        return storage.join(round_uri(self.uri, round), "state")


def _health(labelled: Labelled, old: HeadLabels | None) -> dict[str, float]:
    counts_K = labelled.counts_K
    table = LabelTable(labelled.keys_N, labelled.labels_N)
    return {
        "inertia": labelled.inertia,
        "iterations": float(labelled.iterations),
        "n_empty": float((counts_K == 0).sum()),
        "size_min": float(counts_K.min()),
        "size_max": float(counts_K.max()),
        "effective_clusters": effective_clusters(counts_K),
        "churn": churn(table, None if old is None else old.table),
        "mean_cosine": labelled.mean_cosine,
    }


def _head_named(published: PublishedRound | None, name: str) -> HeadLabels | None:
    heads = published.heads if published is not None else []
    return next((head for head in heads if head.name == name), None)


def _bank_health(frozen: FrozenRows, request: RoundRequest) -> dict[str, float]:
    n_rows = frozen.n_rows
    age_mean = request.step - frozen.step_sum / n_rows if n_rows else 0.0
    expected = request.expected_rows
    return {"coverage": n_rows / expected if expected else 1.0, "age_mean": age_mean}
