"""pretrain: the `Pretrainer` on a Ray cluster, one per worker, a clustering pool beside them.

The edge between `pretrain_at` and Ray Train and the actor pool. Invariant: a run that died anywhere
goes on from its newest checkpoint when the same command is given again.
"""

from typing import Any

from clustering.pool.pool import ClusterPool
from pipeline.storage import Location
from training.attempt import UNHELD, Attempt
from training.config import TrainingConfig
from training.on_ray import fit as ray_fit
from training.run.checkpoints import WHOLE, Span
from training.run.pinned import Pinned
from training.run.pretrain import CHECKPOINTS, RoundsMade, pretrain_at, rounds_made
from training.tracking.copier import RunHandle


def pretrain(
    config: TrainingConfig,
    data: Pinned,
    out: Location,
    handle: RunHandle,
    provenance: dict[str, Any],
    *,
    span: Span = WHOLE,
    attempt: Attempt = UNHELD,
) -> dict[str, Any]:
    """Train into `out`, which all nodes reach. Returns: the last metrics and times.

    Raises: TrainingError; ClusteringError.
    """
    import ray

    actors = _actors(config, rounds_made(config, data.train), out, attempt)
    settings = {
        "config": ray_fit.for_workers(config),
        "index": [ray.put(data.train)],
        "rounds": None if actors is None else actors.client(),
        "out": out,
        "handle": tuple(handle),
        "provenance": provenance,
        "span": tuple(span),
        "attempt": tuple(attempt),
    }
    try:
        result = ray_fit.fit(_loop, settings, out, CHECKPOINTS, config.scale, attempt=attempt)
    finally:
        if actors is not None:
            actors.close()
    return dict(result or {})


def _actors(
    config: TrainingConfig, made: RoundsMade | None, out: Location, attempt: Attempt
) -> ClusterPool | None:
    if made is None:
        return None
    where, check = out.uri_of("rounds"), attempt.check
    return ClusterPool(
        made.clustering,
        config.pool,
        made.widths,
        where,
        config.seed,
        given=made.given,
        may_write=check,
    )


def _loop(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What every worker runs."""
    import ray

    config = TrainingConfig.model_validate(settings["config"])
    index = ray.get(settings["index"][0])
    written = ray_fit.written(settings)
    edge = ray_fit.this_edge(config.scale, written, CHECKPOINTS)
    span = Span(*settings["span"])
    return pretrain_at(edge, config, index, settings["rounds"], written, span)
