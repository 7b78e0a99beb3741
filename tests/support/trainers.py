"""Trainers over clips in memory, and hooks that remember what they were told.

Knows nothing of Ray. Invariant: equal arguments give equal trainers.
"""

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support.memory import SHAPE, MemoryReader, memory_index

from clustering.config import KMeansConfig
from clustering.kmeans.label_table import LabelTable
from clustering.rounds.local import LocalRounds
from training.config import TrainingConfig
from training.data.order import BatchPlan, WindowPlan, balanced_draws, lanes_of
from training.data.rows import RowIndex
from training.loop.finetuner import Finetuner
from training.loop.hooks import Hooks, World
from training.loop.pretrainer import Pretrainer
from training.model.classifier import Classifier
from training.model.encoder import Encoder

_ALONE = World()
_NO_GUARD = {"max_mean_cosine": 1.0, "min_effective_frac": 0.0, "max_churn": 1.0}
"""Embeddings of a few steps lie close together, which a real run would be stopped for."""


def pretrain_config(**changes: Any) -> TrainingConfig:
    base: dict[str, Any] = {
        "encoder": {"preset": "tiny", "dim": 32, "projection": 16},
        "data": {"lanes": 4, "shuffle_window": 8, "fbank_mean": 0.0, "fbank_std": 3.0},
        "augment": {"crop_scale_min": 0.8, "gain": 0.2, "fbank_noise": 0.1, "shift_frac": 0.1},
        "loss": {"temperature": 0.1, "instance_on": "h", "intra": 1.0, "intra_epochs": 1},
        "rounds": {"warmup_epochs": 1, "margin_nats": -9.0, "lead_steps": 1, "features": "train"},
        "pretrain": {"epochs": 3, "batch_size": 16, "checkpoint_every": 2, "log_every": 2},
        "confusion": {"update_steps": 2},
        "optim": {"lr": 1e-3},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values}
    return TrainingConfig.model_validate(base)


class Recorder:
    """Hooks that keep everything."""

    def __init__(self, rounds: LocalRounds | None = None, folder: str = "") -> None:
        self.rounds, self.folder = rounds, folder
        self.states: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.failed: list[dict[str, Any]] = []
        self._number = itertools.count()

    def save(self, state: dict[str, Any]) -> None:
        state = _kept(state)
        if self.rounds is not None:
            state["bank"] = f"{self.folder}/bank-{next(self._number)}"
            self.rounds.save(state["bank"])
        self.states.append(state)

    def hooks(self) -> Hooks:
        def failed(content: dict[str, Any]) -> str:
            self.failed.append(content)
            return "kept"

        return Hooks(lambda step, m: self.logged.append((step, m)), self.save, failed)


def _kept(value: Any) -> Any:
    """A copy that training does not change; of 400 small tensors a tenth of `deepcopy`'s time."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _kept(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_kept(inner) for inner in value]
    return copy.deepcopy(value)


def make_trainer(
    config: TrainingConfig,
    folder: Path,
    recorder: Recorder | None = None,
    world: World = _ALONE,
    rounds: bool = True,
    poison: int | None = None,
    given: LabelTable | None = None,
    guard: Mapping[str, float] = _NO_GUARD,
) -> tuple[Pretrainer, Recorder]:
    index = memory_index()
    torch.manual_seed(config.seed)
    encoder = Encoder(config.encoder, SHAPE)
    widths = {s: config.encoder.projection for s in config.loss.label_streams}
    clusters = None
    if rounds:
        clustering = KMeansConfig.model_validate({"k": 4, "guard": guard})
        clusters = LocalRounds(clustering, widths, str(folder / "rounds"), seed=0, given=given)
    recorder = recorder or Recorder(clusters, str(folder))
    plan = BatchPlan.of(len(index), config.pretrain.batch_size, config.data)
    lanes = lanes_of(world.rank, world.size, plan.lanes)
    reader = MemoryReader(WindowPlan(index, plan, lanes, config.seed), poison)
    trainer = Pretrainer(
        config,
        encoder,
        index,
        reader=reader,
        rounds=clusters,
        world=world,
        hooks=recorder.hooks(),
    )
    return trainer, recorder


def weights_of(trainer: Pretrainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.encoder.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def finetune_config(**tuning: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "encoder": {"preset": "tiny", "dim": 32, "projection": 16},
            "data": {"lanes": 4, "fbank_mean": 0.0, "fbank_std": 3.0},
            "pretrain": {"log_every": 1},
            "confusion": {"update_steps": 2},
            "finetune": {
                "epochs": 3,
                "batch_size": 16,
                "confusion": 1.0,
                "optim": {"lr": 2e-3, "head_lr_scale": 1.0, "warmup_epochs": 0},
                **tuning,
            },
        }
    )


def make_tuner(
    config: TrainingConfig,
    states: list[dict[str, Any]] | None = None,
    world: World = _ALONE,
    index: RowIndex | None = None,
) -> Finetuner:
    index = memory_index() if index is None else index
    torch.manual_seed(config.seed)
    encoder = Encoder(config.encoder, SHAPE)
    auxiliary = config.finetune.auxiliary > 0
    classifier = Classifier(
        encoder,
        len(index.classes),
        config.finetune.mode,
        auxiliary,
        multi_label=config.finetune.loss == "bce",
    )
    plan = BatchPlan.of_finetuning(len(index), config)
    draws = balanced_draws(index, config.seed) if config.finetune.balanced else None
    lanes = lanes_of(world.rank, world.size, plan.lanes)
    reader = MemoryReader(WindowPlan(index, plan, lanes, config.seed, draws))

    def save(state: dict[str, Any]) -> None:
        if states is not None:
            states.append(_kept(state))

    hooks = Hooks(lambda step, metrics: None, save, lambda content: "nowhere")
    return Finetuner(config, classifier, index, reader=reader, world=world, hooks=hooks)
