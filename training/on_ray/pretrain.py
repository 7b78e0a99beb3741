"""pretrain: the `Pretrainer` on a Ray cluster, one per worker, a clustering pool beside them.

The edge between `pretrain_at` and Ray Train and the actor pool. Invariant: a run that died anywhere
goes on from its newest checkpoint when the same command is given again.
"""

from typing import Any

from clustering.pool.pool import ClusterPool
from training.config import TrainingConfig
from training.on_ray import fit as ray_fit
from training.run.checkpoints import WHOLE, Span
from training.run.edge import Written
from training.run.pinned import Pinned
from training.run.pretrain import CHECKPOINTS, RoundsMade, pretrain_at, rounds_made


def pretrain(
    config: TrainingConfig, data: Pinned, written: Written, span: Span = WHOLE
) -> dict[str, Any]:
    """Train into `written.out`, which all nodes reach. Returns: the last metrics and times.

    Raises: TrainingError; ClusteringError.
    """
    import ray

    actors = _actors(config, rounds_made(config, data.train), written)
    settings = {
        "config": ray_fit.for_workers(config),
        "index": [ray.put(data.train)],
        "rounds": None if actors is None else actors.client(),
        "span": span,
    }
    try:
        result = ray_fit.fit(_loop, settings, written, CHECKPOINTS, config.scale)
    finally:
        if actors is not None:
            actors.close()
    return dict(result or {})


def _actors(
    config: TrainingConfig, made: RoundsMade | None, written: Written
) -> ClusterPool | None:
    if made is None:
        return None
    return ClusterPool(
        made.clustering,
        config.pool,
        made.widths,
        written.out.uri_of("rounds"),
        config.seed,
        given=made.given,
        may_write=written.attempt.check,
    )


def _loop(settings: dict[str, Any], written: Written) -> dict[str, Any] | None:
    """What every worker runs."""
    import ray

    config = TrainingConfig.model_validate(settings["config"])
    index = ray.get(settings["index"][0])
    edge = ray_fit.this_edge(config.scale, written, CHECKPOINTS)
    return pretrain_at(edge, config, index, settings["rounds"], written, settings["span"])
