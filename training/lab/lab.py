"""Lab: the `Edge` and the inference of a loop that runs in this process alone.

Knows nothing of other processes or of what is compared. Invariant: a run, and its evaluation, give
the bits they give through Ray with one worker.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clustering.rounds.local import LocalRounds
from training.cluster_config import ScaleConfig
from training.config import DataConfig, TrainingConfig
from training.data.rows import RowIndex
from training.evaluate_config import EvaluateConfig
from training.lab.features import DecodedFeatures, MappedReader
from training.loop.finetuner import refuse_labels
from training.loop.hooks import World
from training.model.cpu import use_cpu
from training.predict.apply import Model, Models, Outputs
from training.predict.jobs import Batches, Gathered, Job
from training.run.checkpoints import KEPT, Span, newest_checkpoint, state_in, write_state
from training.run.edge import Edge, Written
from training.run.finetune import CHECKPOINTS as FINETUNE
from training.run.finetune import deciding, finetune_at, refuse_other_settings
from training.run.pretrain import CHECKPOINTS as PRETRAIN
from training.run.pretrain import pretrain_at, rounds_made


class Lab:
    """Pretraining, fine-tuning and inference in this process."""

    def __init__(self, features: DecodedFeatures) -> None:
        self.features = features

    def pretrain(
        self, config: TrainingConfig, train: RowIndex, written: Written, span: Span
    ) -> dict[str, Any]:
        """Train. Returns: the last metrics and times. Raises: TrainingError; ClusteringError."""
        edge = self._edge(config.scale, written, PRETRAIN)
        made = rounds_made(config, train)
        if made is None:
            return pretrain_at(edge, config, train, None, written, span) or {}
        rounds = LocalRounds(
            made.clustering,
            made.widths,
            written.out.uri_of("rounds"),
            config.seed,
            given=made.given,
            keep_vectors=config.pool.keep_vectors,
        )
        try:
            return pretrain_at(edge, config, train, rounds, written, span) or {}
        finally:
            rounds.close()

    def finetune(
        self, config: TrainingConfig, train: RowIndex, encoder_uri: str, written: Written
    ) -> dict[str, Any]:
        """Train a classifier. Raises: TrainingError; ConfigMismatch."""
        refuse_labels(train, config.finetune.loss)
        refuse_other_settings(config, encoder_uri, written.out)
        edge = self._edge(config.scale, written, FINETUNE)
        decides = deciding(config, encoder_uri)
        return finetune_at(edge, config, train, encoder_uri, written, decides) or {}

    def apply(
        self,
        jobs: Sequence[Job],
        models: Models,
        data: DataConfig,
        scale: ScaleConfig,
        evaluate: EvaluateConfig,
    ) -> list[Outputs]:
        """See `Apply`."""
        use_cpu(scale.n_threads)
        model = Model(models, data, "cpu", evaluate.precision)
        gathered = [Gathered(len(job.rows)) for job in jobs]
        batches = Batches(jobs, data.frames_per_clip)
        for number in range(len(batches)):
            for part in batches.parts(number):
                (clips,) = self.features.read(part.window)
                gathered[part.job].put(clips.position, part.outputs(model, clips))
        return [each.outputs() for each in gathered]

    def _edge(self, scale: ScaleConfig, written: Written, name: str) -> Edge:
        use_cpu(scale.n_threads)
        newest = newest_checkpoint(written.out, name)

        def save(state: dict[str, Any]) -> None:
            written.attempt.check()
            _keep(state | {"attempt": written.attempt.number}, Path(written.out.join(name)))

        return Edge(
            World(),
            lambda windows: MappedReader(windows, self.features),
            None if newest is None else state_in(newest[1]),
            save,
        )


def _keep(state: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint whole or not at all, and drop all but the newest ones."""
    scratch = folder / "writing"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    write_state(state, scratch)
    target = folder / f"checkpoint_{state['step']:08d}"
    shutil.rmtree(target, ignore_errors=True)
    os.rename(scratch, target)
    for old in sorted(folder.glob("checkpoint_*"))[:-KEPT]:
        shutil.rmtree(old)
