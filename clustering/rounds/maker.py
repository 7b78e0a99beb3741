"""A round from frozen rows: cluster, prototypes, confusion, health, publish.

Knows nothing of Ray or of who holds the rows (`Passes` does). Invariant: labels, prototypes,
confusion and health (but for the seconds) are a function of snapshot, round before, config, seed
and, where labels are given, of them.

Shapes: N rows, K clusters, P width of a stream.
"""

import time
from collections.abc import Mapping

import numpy as np

from clustering import storage
from clustering.config import ClusteringConfig
from clustering.errors import MissingLabels
from clustering.kmeans.exact import grid_exponent
from clustering.kmeans.lloyd import Clustering, cluster
from clustering.kmeans.passes import Passes, Table
from clustering.kmeans.share import Preparation
from clustering.kmeans.views import Target, each_stream, stream_slices, targets_of
from clustering.rounds.files import publish, round_before, round_uri
from clustering.rounds.given import GivenLabels, check_given, digest, label_as_given
from clustering.rounds.health import churn, effective_clusters, merge_health, withheld_because
from clustering.rounds.protocol import HeadLabels, PublishedRound, RoundRequest
from clustering.rounds.snapshot import Snapshot

Labelled = Clustering | GivenLabels


def identity(
    config: ClusteringConfig, streams: Mapping[str, int], seed: int, given: Table | None = None
) -> dict[str, object]:
    """What two makers of the same round must share for a restart to go on with it."""
    same = {"config": config.result_fields(), "streams": dict(streams), "seed": seed}
    return same if given is None else {**same, "given": digest(given)}


class StateFile:
    """The checkpoint of one clustering, replaced after each iteration."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def load(self) -> dict[str, np.ndarray] | None:
        """The last state, or None."""
        try:
            return storage.read_arrays(self._uri)
        except FileNotFoundError:
            return None

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        """Replace the state."""
        storage.write_arrays(self._uri, arrays)


class RoundMaker:
    """Makes the rounds of one run, one after the other, under one URI."""

    def __init__(
        self,
        config: ClusteringConfig,
        streams: Mapping[str, int],
        uri: str,
        seed: int,
        given: Table | None = None,
    ) -> None:
        self._config = config
        self._streams = dict(streams)
        self._uri = uri
        self._seed = seed
        self._targets = targets_of(config, streams)
        self._given = given if given is None else check_given(given, config.k)
        if given is not None:
            # All streams learn the same labels: one head, measured in the space of the first.
            self._targets = [Target("given", self._targets[0].view, 0, tuple(streams))]

    def make(self, passes: Passes, snapshot: Snapshot, request: RoundRequest) -> PublishedRound:
        """Cluster the snapshot and publish the round, or withhold it with its reason.

        Raises: BadVectors if the snapshot cannot be clustered at all.
        """
        started = time.perf_counter()
        before = round_before(self._uri, request.round)
        heads, health = [], {}
        reason = ""
        try:
            for target in self._targets:
                old = _head_named(before, target.name)
                clustering = self._labelled(passes, target, request, old)
                health[target.name] = self._health(clustering, old)
                heads.append(self._head(passes, snapshot, target, clustering, request))
        except MissingLabels as error:
            reason = f"missing labels: {error}"
        merged = merge_health(health) if health else {}
        merged.update(_bank_health(snapshot, request), seconds=time.perf_counter() - started)
        if not reason:
            reasons = (
                withheld_because({**merged, **own}, self._config.k, self._config.guard)
                for own in health.values()
            )
            reason = next(filter(None, reasons), "")
        published = PublishedRound(
            request.round,
            request.effective_step,
            not reason,
            reason,
            [] if reason else heads,
            merged,
        )
        publish(self._uri, published)
        self._forget_states(request.round)
        return published

    def _labelled(
        self, passes: Passes, target: Target, request: RoundRequest, old: HeadLabels | None
    ) -> Labelled:
        if self._given is not None:
            return label_as_given(passes, target.view, self._config, self._seed, self._given)
        warm: Table | None = None
        if old is not None and not request.cold:
            warm = (old.keys_N, old.labels_N)
        entropy = [self._seed & 0xFFFFFFFFFFFFFFFF, target.head, request.round]
        return cluster(
            passes,
            target.view,
            self._config,
            int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]),
            warm=warm,
            checkpoint=StateFile(self._state_uri(request.round, target.name)),
        )

    def _head(
        self,
        passes: Passes,
        snapshot: Snapshot,
        target: Target,
        clustering: Labelled,
        request: RoundRequest,
    ) -> HeadLabels:
        """Prototypes and confusion of one clustering, from exact sums over the snapshot."""
        table = passes.share_out((clustering.keys_N, clustering.labels_N))
        view = each_stream(self._streams)
        prep = Preparation(view, grid_exponent(1.0, snapshot.n_rows))
        sums, _ = passes.label_sums(prep, table, self._config.k)
        slices = stream_slices(self._streams)
        prototypes = {name: _unit(sums[:, a:b]) for name, (a, b) in slices.items()}
        teaching = tuple((slices[name][0], prototypes[name]) for name in target.teaches)
        confusion = passes.posterior_sums(
            prep, passes.share_out(teaching), request.posterior_temperature, table
        )
        totals = confusion.sum(axis=1, keepdims=True)
        confusion = np.where(
            totals > 0, confusion / np.where(totals > 0, totals, 1), np.eye(self._config.k)
        )
        return HeadLabels(
            target.name,
            target.teaches,
            clustering.keys_N,
            clustering.labels_N,
            prototypes,
            confusion.astype(np.float32),
        )

    def _health(self, clustering: Labelled, old: HeadLabels | None) -> dict[str, float]:
        counts = clustering.counts_K
        table = (clustering.keys_N, clustering.labels_N)
        return {
            "inertia": clustering.inertia,
            "iterations": float(clustering.iterations),
            "n_empty": float((counts == 0).sum()),
            "size_min": float(counts.min()),
            "size_max": float(counts.max()),
            "effective_clusters": effective_clusters(counts),
            "churn": churn(table, (old.keys_N, old.labels_N) if old is not None else None),
            "mean_cosine": clustering.mean_cosine,
        }

    def _state_uri(self, round: int, head: str) -> str:
        return storage.join(round_uri(self._uri, round), "state", f"{head}.npz")

    def _forget_states(self, round: int) -> None:
        storage.remove(storage.join(round_uri(self._uri, round), "state"))


def _head_named(published: PublishedRound | None, name: str) -> HeadLabels | None:
    heads = published.heads if published is not None else []
    return next((head for head in heads if head.name == name), None)


def _bank_health(snapshot: Snapshot, request: RoundRequest) -> dict[str, float]:
    n_rows = snapshot.n_rows
    age_mean = request.step - snapshot.step_sum / n_rows if n_rows else 0.0
    expected = request.expected_rows
    return {"coverage": n_rows / expected if expected else 1.0, "age_mean": age_mean}


def _unit(sums_KP: np.ndarray) -> np.ndarray:
    length = np.sqrt((sums_KP * sums_KP).sum(axis=1, keepdims=True))
    return (sums_KP / np.where(length > 0, length, 1.0)).astype(np.float32)
