"""finetune: the `Finetuner` on a Ray cluster, one per worker.

The edge between `finetune_at` and Ray Train.
"""

from typing import Any

from training.config import TrainingConfig
from training.data.rows import RowIndex
from training.loop.finetuner import refuse_labels
from training.on_ray import fit as ray_fit
from training.run.edge import Written
from training.run.finetune import CHECKPOINTS, deciding, finetune_at, refuse_other_settings
from training.weights.files import absolute_uri


def finetune(
    config: TrainingConfig, index: RowIndex, encoder_uri: str, written: Written
) -> dict[str, Any]:
    """Train a classifier on the cluster Ray is connected to.

    Args: encoder_uri: folder of a diccae encoder (`starting_encoder` makes one).
    Raises: TrainingError; ConfigMismatch as `refuse_other_settings`.
    """
    import ray

    refuse_labels(index, config.finetune.loss)
    refuse_other_settings(config, encoder_uri, written.out)
    settings = {
        "config": ray_fit.for_workers(config),
        "index": [ray.put(index)],
        "encoder": absolute_uri(encoder_uri),
        "decides": deciding(config, encoder_uri),
    }
    last = ray_fit.fit(_loop, settings, written, CHECKPOINTS, config.scale)
    return dict(last or {})


def _loop(settings: dict[str, Any], written: Written) -> dict[str, Any] | None:
    """What every worker runs."""
    import ray

    config = TrainingConfig.model_validate(settings["config"])
    edge = ray_fit.this_edge(config.scale, written, CHECKPOINTS)
    index: RowIndex = ray.get(settings["index"][0])
    return finetune_at(edge, config, index, settings["encoder"], written, settings["decides"])
