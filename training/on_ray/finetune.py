"""finetune: the `Finetuner` on a Ray cluster, one per worker.

The edge between the pure `Finetuner` and Ray Train and the run folder. Invariants: a run that died
anywhere goes on from its newest checkpoint when the same command is given again; a checkpoint of
other settings, or of another encoder, is refused.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from training.attempt import UNHELD, Attempt
from training.config import TrainingConfig
from training.data.order import BatchPlan, WindowPlan, balanced_draws, lanes_of
from training.data.rows import RowIndex
from training.errors import ConfigMismatch
from training.loop.finetuner import Finetuner, refuse_unlabelled
from training.loop.hooks import Hooks, World
from training.model.make import make_classifier, make_encoder
from training.on_ray import fit as ray_fit
from training.on_ray.reader import RayReader
from training.tracking.copier import RunHandle
from training.weights.card import Applied
from training.weights.files import (
    absolute_uri,
    encoder_digest,
    load_encoder,
    load_weights,
    save_classifier,
    save_encoder,
)

CHECKPOINTS = "finetune"
"""Folder of the run that holds the checkpoints of fine-tuning."""

_DECIDES: dict[str, Any] = {
    "seed": True,
    "data": True,
    "confusion": True,
    "finetune": True,
    "pretrain": {"precision", "sdpa", "compile"},
}
"""What of the config a classifier depends on, besides its encoder and clips."""

_STATISTICS = ("data.fbank_mean", "data.fbank_std")


def finetune(
    config: TrainingConfig,
    index: RowIndex,
    encoder_uri: str,
    out: Path,
    handle: RunHandle,
    provenance: dict[str, Any],
    *,
    attempt: Attempt = UNHELD,
) -> dict[str, Any]:
    """Train a classifier on the cluster Ray is connected to.

    Args: encoder_uri: folder of a diccae encoder (`starting_encoder` makes one).
    Raises: TrainingError; ConfigMismatch as `refuse_other_settings`.
    """
    import ray

    refuse_unlabelled(index)
    refuse_other_settings(config, encoder_uri, out)
    settings = {
        "config": ray_fit.for_workers(config),
        "index": [ray.put(index)],
        "encoder": absolute_uri(encoder_uri),
        "decides": _deciding(config, encoder_uri),
        "out": str(out),
        "handle": tuple(handle),
        "provenance": provenance,
        "attempt": tuple(attempt),
    }
    last = ray_fit.fit(_loop, settings, out, CHECKPOINTS, config.scale, attempt=attempt)
    return dict(last or {})


def starting_encoder(
    config: TrainingConfig,
    index: RowIndex,
    uri: str | None,
    out: Path,
    provenance: dict[str, Any],
) -> str:
    """The folder of the encoder to start from; `<out>/encoder`, which evaluation reads, is there
    afterwards.

    Args: uri: another encoder than that of the run; None takes the run's own, or makes one of
        `encoder.init`, or of nothing.
    """
    own = str(out / "encoder")
    if (out / "encoder" / "encoder.json").exists():
        return own if uri is None else uri
    known: dict[str, Any] = {
        "statistics": config.data.statistics, "applied": Applied.of(config),
    }  # fmt: skip
    if uri is not None:
        encoder, card = load_encoder(uri)
        save_encoder(encoder, own, card.classes, card.feature_spec, card.provenance, **known)
        return uri
    encoder = make_encoder(config, index.spec)
    if config.encoder.init is not None:
        load_weights(encoder, config.encoder.init)
    spec = index.spec.model_dump(mode="json")
    save_encoder(encoder, own, index.classes, spec, provenance, **known)
    return own


def refuse_other_settings(config: TrainingConfig, encoder_uri: str | None, out: Path) -> None:
    """Compare with the newest checkpoint of fine-tuning, if there is one.

    Args: encoder_uri: None for the run's own.
    Raises: ConfigMismatch naming the keys that differ.
    """
    newest = ray_fit.newest_checkpoint(out, CHECKPOINTS)
    if newest is None:
        return
    old = json.loads(ray_fit.state_in(newest[1], mmap=True)["decides"])
    new = json.loads(_deciding(config, encoder_uri or str(out / "encoder")))
    # Left out of a config, the statistics are those the run began with, which cannot differ.
    left_to_run = {key for key in _STATISTICS if new.get(key) is None}
    keys = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted((old.keys() | new.keys()) - left_to_run)
        if old.get(key) != new.get(key)
    ]
    if keys:
        raise ConfigMismatch(
            f"{out / CHECKPOINTS} holds fine-tuning with other settings: {'; '.join(keys)}. Use "
            "the old ones, another --out, or --fresh to fine-tune again (this deletes the old "
            "classifier)."
        )


def forget_finetuning(out: Path) -> None:
    """Delete classifier and checkpoints of fine-tuning, to start it again."""
    for name in (CHECKPOINTS, "classifier"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "finetune.jsonl").unlink(missing_ok=True)


def _deciding(config: TrainingConfig, encoder_uri: str) -> str:
    """Dotted keys and values of all that decides the result, as JSON."""
    flat: dict[str, Any] = {"encoder": encoder_digest(encoder_uri)}
    _flatten(config.model_dump(mode="json", include=_DECIDES), "", flat)
    return json.dumps(flat, sort_keys=True)


def _flatten(values: dict[str, Any], prefix: str, into: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{key}.", into)
        else:
            into[prefix + key] = value


def _loop(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What every worker runs."""
    import ray

    config = TrainingConfig.model_validate(settings["config"])
    world = ray_fit.this_world(config.scale)
    index: RowIndex = ray.get(settings["index"][0])
    out, attempt = Path(settings["out"]), Attempt(*settings["attempt"])
    state = ray_fit.last_state()
    encoder, _ = load_encoder(settings["encoder"])
    classifier = make_classifier(config, encoder, len(index.classes))
    handle = RunHandle(*settings["handle"])
    tracker = ray_fit.tracker_for(world, handle, out / "finetune.jsonl", state, attempt=attempt)

    def write(step: int, metrics: dict[str, float]) -> None:
        if tracker is not None:
            tracker.log(step, {f"finetune/{name}": value for name, value in metrics.items()})

    def save(state: dict[str, Any]) -> None:
        ray_fit.report_state({**state, "decides": settings["decides"]}, world.rank, attempt)

    keep = ray_fit.failure_writer(out, world.rank, attempt)
    hooks = Hooks(write, save, keep, ray_fit.leaving_notice())
    reader = _reader(config, index, world)
    tuner = Finetuner(config, classifier, index, reader=reader, world=world, hooks=hooks)
    last = tuner.run(state)
    if tracker is None:
        return None
    attempt.check()
    save_classifier(
        classifier,
        str(out / "classifier"),
        index.classes,
        index.spec.model_dump(mode="json"),
        settings["provenance"],
        statistics=config.data.statistics,
        applied=Applied.of(config),
    )
    tracker.close()
    return {"metrics": last}


def _reader(config: TrainingConfig, index: RowIndex, world: World) -> RayReader:
    tuning = config.finetune
    plan = BatchPlan.of(len(index), tuning.batch_size, config.data)
    lanes = lanes_of(world.rank, world.size, plan.lanes)
    draws = balanced_draws(index, config.seed) if tuning.balanced else None
    windows = WindowPlan(index, plan, lanes, config.seed + 1, draws)
    return RayReader(windows, config.scale.reader_tasks, config.scale.reader_cpus)
