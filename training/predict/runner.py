"""Runner: a model applied to batches of jobs, whose clips are read from a store ahead.

Knows nothing of Ray or of metrics. Invariants: no randomness; the same bits in whichever process a
batch runs, with as many threads.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.side_by_side import side_by_side
from training.cluster_config import ScaleConfig
from training.config import DataConfig
from training.data.reader import Batch, read_window
from training.evaluate_config import EvaluateConfig
from training.model.cpu import threads_kept, use_cpu
from training.predict.apply import ByStream, Model, Models, Outputs
from training.predict.jobs import Batches, Gathered, Job, Kind, Part

_AHEAD = 3
"""Batches that are read or lie decoded while another one runs. From a bucket a batch of 64 clips
takes 2 s to read and decode and 0.1 s of a GPU; 10 frames of 224 pixels of each and their fbanks
are 110 MB."""


class Found(NamedTuple):
    """Outputs of some clips of one job."""

    job: int
    """Its place among the jobs."""
    positions: NDArray[np.int64]
    """Rows of the job's index."""
    kinds: dict[Kind, ByStream]


class Runner:
    """On a GPU if `scale.use_gpu`, else with `scale.n_threads` threads of this process."""

    def __init__(
        self,
        jobs: Sequence[Job],
        models: Models,
        data: DataConfig,
        scale: ScaleConfig,
        evaluate: EvaluateConfig,
    ) -> None:
        self.batches = Batches(jobs, data.frames_per_clip)
        device = "cuda" if scale.use_gpu else "cpu"
        if device == "cpu":
            use_cpu(scale.n_threads)
        self._model = Model(models, data, device, evaluate.precision)
        self._cache = scale.cache

    def outputs(self, numbers: Iterable[int]) -> Iterator[Found]:
        """Of the clips of these batches, in their order."""
        for clips in side_by_side(self._read, numbers, 1 + _AHEAD):
            for part, decoded in clips:
                yield Found(part.job, decoded.position, part.outputs(self._model, decoded))

    def _read(self, number: int) -> list[tuple[Part, Batch]]:
        """The clips of a batch, decoded."""
        clips = []
        for part in self.batches.parts(number):
            (decoded,) = read_window(part.window, self._cache)
            clips.append((part, decoded))
        return clips


def run_here(
    jobs: Sequence[Job],
    models: Models,
    data: DataConfig,
    scale: ScaleConfig,
    evaluate: EvaluateConfig,
) -> list[Outputs]:
    """See `Apply`; in this process."""
    gathered = [Gathered(len(job.rows)) for job in jobs]
    with threads_kept():
        runner = Runner(jobs, models, data, scale, evaluate)
        for found in runner.outputs(range(len(runner.batches))):
            gathered[found.job].put(found.positions, found.kinds)
    return [each.outputs() for each in gathered]
