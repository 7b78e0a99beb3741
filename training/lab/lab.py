"""Lab: the `Edge` and the inference of a loop that runs in this process alone.

Knows nothing of other processes or of what is compared. Invariant: a run gives the bits it gives
through Ray with one worker.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clustering.config import KMeansConfig, PoolConfig
from clustering.rounds.local import LocalRounds
from training.cluster_config import ScaleConfig
from training.config import DataConfig, EvaluateConfig, TrainingConfig
from training.data.order import FrameDraw, window_of
from training.data.rows import RowIndex
from training.lab.features import DecodedFeatures, MappedReader
from training.loop.finetuner import refuse_labels
from training.loop.hooks import World
from training.model.cpu import use_cpu
from training.on_ray.inference import Gathered, Job
from training.predict.apply import Model, Models, Outputs, test_passes
from training.run.checkpoints import Span, newest_checkpoint, state_in, write_state
from training.run.edge import Edge, Written
from training.run.finetune import CHECKPOINTS as FINETUNE
from training.run.finetune import deciding, finetune_at, refuse_other_settings
from training.run.pretrain import CHECKPOINTS as PRETRAIN
from training.run.pretrain import pretrain_at, rounds_made

_KEPT = 2
"""Checkpoints, as on Ray."""
_ROWS = 64
"""Clips in one forward pass of inference, as on Ray."""


class Lab:
    """Pretraining, fine-tuning and inference in this process."""

    def __init__(self, features: DecodedFeatures) -> None:
        self.features = features

    def pretrain(
        self,
        config: TrainingConfig,
        clustering: KMeansConfig,
        train: RowIndex,
        written: Written,
        *,
        pool: PoolConfig,
        span: Span,
    ) -> dict[str, Any]:
        """Train. Returns: the last metrics and times. Raises: TrainingError; ClusteringError."""
        edge = self._edge(config.scale, written, PRETRAIN)
        made = rounds_made(config, clustering, train)
        if made is None:
            return pretrain_at(edge, config, train, None, written, span) or {}
        rounds = LocalRounds(
            made.clustering,
            made.widths,
            written.out.uri_of("rounds"),
            config.seed,
            given=made.given,
            keep_vectors=pool.keep_vectors,
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
        model = Model(models, data, "cpu", evaluate.precision or "fp32")
        return [self._of_job(job, model, data.frames_per_clip) for job in jobs]

    def _of_job(self, job: Job, model: Model, frames_per_clip: int) -> Outputs:
        n_passes = test_passes(job.rows.spec.n_frames, frames_per_clip, job.frames)
        frames = FrameDraw(frames_per_clip * n_passes, random=False)
        gathered = Gathered(len(job.rows))
        for start in range(0, len(job.rows), _ROWS):
            positions = np.arange(start, min(start + _ROWS, len(job.rows)))
            (batch,) = self.features.read(window_of(job.rows, positions[None], frames))
            outputs = model(batch.fbank, batch.frames, n_passes, "p" in job.kinds)
            gathered.put(positions, {kind: getattr(outputs, kind) for kind in job.kinds})
        return gathered.outputs()

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
    for old in sorted(folder.glob("checkpoint_*"))[:-_KEPT]:
        shutil.rmtree(old)
