"""Fine-tuning on a Ray cluster.

The edge between the pure `Finetuner` and Ray Train and the run folder. Invariant: a run that died
anywhere goes on from its newest checkpoint when the same command is given again.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.config import TrainingConfig
from training.data.batches import BatchPlan, RowIndex, lanes_of
from training.data.reader import RayReader, WindowPlan
from training.errors import TrainingError
from training.loop.finetuner import Finetuner, balanced_draws
from training.loop.pretrainer import Hooks
from training.model.classifier import Classifier
from training.model.encoder import Encoder
from training.on_ray import fit as ray_fit
from training.on_ray.pretrain import failure_writer, make_encoder
from training.tracking.tracker import RunHandle, Tracker
from training.weights.files import absolute_uri, load_encoder, load_weights, save_classifier

CHECKPOINTS = "finetune"
"""Folder of the run that holds the checkpoints of fine-tuning."""


def finetune(
    config: TrainingConfig,
    index: RowIndex,
    encoder_uri: str | None,
    out: Path,
    handle: RunHandle,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Train a classifier on the cluster Ray is connected to.

    Args: encoder_uri: folder of a diccae encoder; None starts from `encoder.init` or from nothing.
    Raises: TrainingError.
    """
    import ray

    unlabelled = np.flatnonzero(index.labels_N < 0)
    if len(unlabelled):
        raise TrainingError(
            f"{len(unlabelled)} clips of the train split have no label, such as "
            f"{index.clip_ids_N[unlabelled[0]]}; fine-tuning needs one for every clip"
        )
    settings = {
        "config": ray_fit.for_workers(config),
        "index": [ray.put(index)],
        "encoder": encoder_uri and absolute_uri(encoder_uri),
        "out": str(out),
        "handle": tuple(handle),
        "provenance": provenance,
    }
    return dict(ray_fit.fit(_loop, settings, out, CHECKPOINTS, config.scale) or {})


def starting_encoder(config: TrainingConfig, index: RowIndex, uri: str | None) -> Encoder:
    """The pretrained encoder, published weights, or a new one."""
    if uri is not None:
        encoder, _ = load_encoder(uri)
        return encoder
    encoder = make_encoder(config, index.spec)
    if config.encoder.init is not None:
        load_weights(encoder, config.encoder.init)
    return encoder


def _new_classifier(config: TrainingConfig, index: RowIndex, uri: str | None) -> Classifier:
    """An encoder with new heads, the same on every worker."""
    encoder = starting_encoder(config, index, uri)
    tuning = config.finetune
    torch.manual_seed(config.seed)
    auxiliary = tuning.mode == "multimodal" and tuning.auxiliary > 0
    return Classifier(encoder, len(index.classes), tuning.mode, auxiliary)


def _loop(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What every worker runs."""
    import ray

    config = TrainingConfig.model_validate(settings["config"])
    world = ray_fit.this_world(config.scale)
    index: RowIndex = ray.get(settings["index"][0])
    out = Path(settings["out"])
    state = ray_fit.last_state()
    classifier = _new_classifier(config, index, settings["encoder"])
    tuning = config.finetune
    plan = BatchPlan.of(len(index), tuning.batch_size, config.data)
    lanes = lanes_of(world.rank, world.size, plan.lanes)
    draws = balanced_draws(index, config.seed) if tuning.balanced else None
    windows = WindowPlan(index, plan, lanes, config.seed + 1, draws)
    reader = RayReader(windows, config.scale.reader_tasks, config.scale.reader_cpus)
    tracker = None
    if world.rank == 0:
        step = 0 if state is None else int(state["step"])
        tracker = Tracker(RunHandle(*settings["handle"]), out / "finetune.jsonl", step)

    def write(step: int, metrics: dict[str, float]) -> None:
        if tracker is not None:
            tracker.log(step, {f"finetune/{name}": value for name, value in metrics.items()})

    def save(state: dict[str, Any]) -> None:
        ray_fit.report_state(state, world.rank)

    hooks = Hooks(write, save, failure_writer(out, world.rank), ray_fit.leaving_notice())
    last = Finetuner(config, classifier, index, reader, world, hooks).run(state)
    if tracker is None:
        return None
    save_classifier(
        classifier,
        str(out / "classifier"),
        index.classes,
        index.spec.model_dump(mode="json"),
        settings["provenance"],
        statistics=config.data.statistics,
    )
    tracker.close()
    return {"metrics": last}
