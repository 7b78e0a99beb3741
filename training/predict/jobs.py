"""Batches: the clips of several jobs, cut as every backend cuts them, and their outputs in rows.

Knows nothing of Ray, nor of how a clip is read. Invariant: who applies a model batch by batch, part
by part, gets the same bits on the same CPU, whatever reads the clips and wherever the batches run.

Shapes: N clips of a job, F frames a pass sees.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.cluster_config import ScaleConfig
from training.config import DataConfig
from training.data.order import FrameDraw, Window, window_of
from training.data.reader import Batch
from training.data.rows import RowIndex
from training.evaluate_config import EvaluateConfig
from training.predict.apply import ByStream, Model, Models, Outputs, test_passes

Kind = Literal["z", "h", "p"]

_ROWS = 64
"""Clips in one forward pass."""


class Job(NamedTuple):
    """Clips, and how the models are applied to them."""

    rows: RowIndex
    frames: int | None
    """Frames averaged over, see EvaluateConfig.frames; 1 is one pass, of the middle frames
    of as many equal parts of a clip as a pass sees frames."""
    kinds: tuple[Kind, ...]
    """The outputs that come back; without "p" no classifier is applied."""


Apply = Callable[[Sequence[Job], Models, DataConfig, ScaleConfig, EvaluateConfig], list[Outputs]]
"""Outputs for every row of each job's index, in its order: `run_jobs` on Ray, `run_here` in this
process, or the lab's own."""


class Part(NamedTuple):
    """Clips of one job in a batch: what goes through the models together."""

    job: int
    """Its place among the jobs."""
    kinds: tuple[Kind, ...]
    window: Window
    """One step, with the frames of all passes."""
    n_passes: int

    def outputs(self, model: Model, clips: Batch) -> dict[Kind, ByStream]:
        """Of its clips, by kind. Args: clips: `window` as it was read."""
        found = model(clips.fbank, clips.frames, self.n_passes, "p" in self.kinds)
        return {kind: getattr(found, kind) for kind in self.kinds}


class Batches:
    """All clips of some jobs in batches, numbered from 0.

    Args: frames_per_clip: F.
    """

    def __init__(self, jobs: Sequence[Job], frames_per_clip: int) -> None:
        self._jobs, self._frames_per_clip = jobs, frames_per_clip
        self._ends = np.cumsum([len(job.rows) for job in jobs])
        self._bounds = batches_of(int(self._ends[-1]))

    def __len__(self) -> int:
        return len(self._bounds)

    def parts(self, number: int) -> Iterator[Part]:
        """The clips of a batch, those of each job for themselves."""
        numbers = np.arange(*self._bounds[number])
        job_of = np.searchsorted(self._ends, numbers, side="right")
        for at in np.unique(job_of).tolist():
            job = self._jobs[at]
            positions = numbers[job_of == at] - (self._ends[at] - len(job.rows))
            n_passes = test_passes(job.rows.spec.n_frames, self._frames_per_clip, job.frames)
            frames = FrameDraw(self._frames_per_clip * n_passes, random=False)
            yield Part(at, job.kinds, window_of(job.rows, positions[None], frames), n_passes)


def batches_of(n_rows: int) -> list[tuple[int, int]]:
    """First and end of the clips that go through the models together, counted through all jobs.

    Blocks of equal size, each of at most four batches: on a CPU the size of a batch decides last
    digits, so that whoever cuts otherwise changes them.
    """
    block = max(1, n_rows // -(-n_rows // (4 * _ROWS)))
    return [
        (start, min(start + _ROWS, first + block, n_rows))
        for first in range(0, n_rows, block)
        for start in range(first, min(first + block, n_rows), _ROWS)
    ]


class Gathered:
    """Outputs of one job, put in their rows as they come.

    They lie in files that the system may page out, so memory does not grow with the clips.
    """

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.kinds: dict[str, ByStream] = {kind: {} for kind in Outputs._fields}

    def put(self, positions: NDArray[np.int64], kinds: dict[Kind, ByStream]) -> None:
        """Some rows."""
        for kind, by_stream in kinds.items():
            for stream, x in by_stream.items():
                if stream not in self.kinds[kind]:
                    self.kinds[kind][stream] = paged_array(self.n_rows, x.shape[1])
                self.kinds[kind][stream][positions] = x

    def outputs(self) -> Outputs:
        """All rows."""
        return Outputs(**self.kinds)


def paged_array(n_rows: int, width: int) -> NDArray[np.float32]:
    """An array in a file without a name: it is gone with the last reference to it.

    A plain view of it: Ray would copy a memmap into its message, and so into memory, as a whole.
    Raises: OSError if the folder of temporary files (TMPDIR) has no room for it.
    """
    with tempfile.TemporaryFile() as file:
        # Else a full disk is a SIGBUS at some write, and the process is gone without a word.
        os.posix_fallocate(file.fileno(), 0, n_rows * width * np.float32().nbytes)
        return np.memmap(file, np.float32, "w+", shape=(n_rows, width)).view(np.ndarray)
