"""finetune_at: the `Finetuner` between encoder and classifier, at whatever edge it runs.

Knows nothing of Ray or of other processes. Invariants: a run that died anywhere goes on from its
newest checkpoint; a checkpoint of other settings, or of another encoder, is refused.
"""

import hashlib
import json
from typing import Any

from pipeline.storage import Location
from training.cluster_config import NOT_DECIDING
from training.config import TrainingConfig
from training.data.order import BatchPlan, WindowPlan, balanced_draws, lanes_of
from training.data.rows import RowIndex
from training.errors import ConfigMismatch
from training.loop.finetuner import Finetuner
from training.loop.hooks import Hooks, World
from training.model.make import make_classifier, make_encoder
from training.run.checkpoints import failure_writer, newest_checkpoint, state_in
from training.run.edge import Edge, Written, kept
from training.tracking.tracker import FINETUNE_METRICS
from training.weights.card import Applied, Space
from training.weights.files import (
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
    "pretrain": {"precision", "sdpa"},
}
"""What of the config a classifier depends on, besides its encoder and clips."""

_STATISTICS = ("data.fbank_mean", "data.fbank_std")


def starting_encoder(
    config: TrainingConfig,
    index: RowIndex,
    uri: str | None,
    place: Location,
    provenance: dict[str, Any],
) -> str:
    """The folder of the encoder to start from; `encoder/` of the run, which evaluation reads, is
    there afterwards.

    Args: uri: another encoder than that of the run; None takes the run's own, or makes one of
        `encoder.init`, or of nothing.
    """
    own = place.uri_of("encoder")
    if place.exists("encoder/encoder.json"):
        return own if uri is None else uri
    statistics = config.data.statistics
    if uri is not None:
        encoder, card = load_encoder(uri)
        known = (card.classes, card.feature_spec, card.provenance)
        applied = Applied.of(config, card.space)
        save_encoder(encoder, own, *known, statistics=statistics, applied=applied)
        return uri
    encoder = make_encoder(config, index.spec)
    # Fine-tuning trains no class heads: of an encoder that begins at random `z` is all there is.
    space: Space | None = "z"
    if config.encoder.init is not None:
        space = load_weights(encoder, config.encoder.init).space
    applied = Applied.of(config, space)
    known = (index.classes, index.spec.model_dump(mode="json"), provenance)
    save_encoder(encoder, own, *known, statistics=statistics, applied=applied)
    return own


def refuse_other_settings(config: TrainingConfig, encoder_uri: str | None, place: Location) -> None:
    """Compare with the newest checkpoint of fine-tuning, if there is one.

    Args: encoder_uri: None for the run's own.
    Raises: ConfigMismatch naming the keys that differ.
    """
    newest = newest_checkpoint(place, CHECKPOINTS)
    if newest is None:
        return
    old = json.loads(state_in(newest[1], numbers_only=True)["decides"])
    new = json.loads(deciding(config, encoder_uri or place.uri_of("encoder")))
    # Left out of a config, the statistics are those the run began with, which cannot differ.
    left_to_run = {key for key in _STATISTICS if new.get(key) is None}
    # Checkpoints of earlier versions have pretrain.compile among what decides.
    keys = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted((old.keys() | new.keys()) - left_to_run)
        if old.get(key) != new.get(key) and not key.startswith(NOT_DECIDING)
    ]
    if keys:
        raise ConfigMismatch(
            f"{place.uri_of(CHECKPOINTS)} holds fine-tuning with other settings: "
            f"{'; '.join(keys)}. Use the old ones, another --out, or --fresh to fine-tune again "
            "(this deletes the old classifier)."
        )


def forget_finetuning(place: Location) -> None:
    """Delete classifier and checkpoints of fine-tuning, to start it again."""
    for name in (CHECKPOINTS, "classifier", FINETUNE_METRICS):
        place.remove_tree(name)


def deciding(config: TrainingConfig, encoder_uri: str) -> str:
    """Dotted keys and values of all that decides the result, as JSON."""
    flat: dict[str, Any] = {"encoder": encoder_digest(encoder_uri)}
    _flatten(config.model_dump(mode="json", include=_DECIDES), "", flat)
    return json.dumps(flat, sort_keys=True)


def settings_digest(config: TrainingConfig, encoder_uri: str) -> str:
    """Of `deciding`."""
    return hashlib.sha256(deciding(config, encoder_uri).encode()).hexdigest()[:16]


def _flatten(values: dict[str, Any], prefix: str, into: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{key}.", into)
        else:
            into[prefix + key] = value


def finetune_at(
    edge: Edge,
    config: TrainingConfig,
    index: RowIndex,
    encoder_uri: str,
    written: Written,
    decides: str,
) -> dict[str, Any] | None:
    """Train; save the classifier. Args: decides: of `deciding`. Returns: metrics, on rank 0."""
    out, attempt = written.out, written.attempt
    encoder, card = load_encoder(encoder_uri)
    classifier = make_classifier(config, encoder, len(index.classes))
    tracker = written.tracker(FINETUNE_METRICS, edge, edge.state, "finetune/")

    def write(step: int, metrics: dict[str, float]) -> None:
        if tracker is not None:
            tracker.log(step, metrics)

    def save(state: dict[str, Any]) -> None:
        if tracker is not None:
            tracker.publish()
        edge.save({**state, "decides": decides})

    hooks = Hooks(write, save, failure_writer(out, edge.world.rank, attempt), edge.leaving)
    reader = edge.reader(_windows(config, index, edge.world))
    tuner = Finetuner(config, classifier, index, reader=reader, world=edge.world, hooks=hooks)
    with kept(tracker):
        last = tuner.run(edge.state)
    if tracker is None:
        return None
    attempt.check()
    features, statistics = index.spec.model_dump(mode="json"), config.data.statistics
    known = (index.classes, features, written.provenance)
    applied, target = Applied.of(config, card.space), out.uri_of("classifier")
    save_classifier(classifier, target, *known, statistics=statistics, applied=applied)
    tracker.close()
    return {"metrics": last}


def _windows(config: TrainingConfig, index: RowIndex, world: World) -> WindowPlan:
    tuning = config.finetune
    plan = BatchPlan.of_finetuning(len(index), config)
    lanes = lanes_of(world.rank, world.size, plan.lanes)
    draws = balanced_draws(index, config.seed) if tuning.balanced else None
    return WindowPlan(index, plan, lanes, config.seed + 1, draws)
