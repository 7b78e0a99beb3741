"""Clips that exist only in memory, read in the planned order: a store without files.

Knows nothing of trainers. Invariant: a clip looks and sounds like its class, plus noise of its own.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from pipeline.config import FeatureSpec
from training.data.order import EpochReads, FrameDraw, WindowPlan
from training.data.reader import Batch, choose_frames
from training.data.rows import RowIndex
from training.model.encoder import InputShape

SPEC = FeatureSpec(n_frames=2, frame_size=32, n_mels=16, fbank_frames=32, duration_s=1.0)
SHAPE = InputShape(SPEC.fbank_frames, SPEC.n_mels, SPEC.frame_size)
N_CLIPS, N_CLASSES = 48, 4


def memory_index() -> RowIndex:
    rng = np.random.default_rng(0)
    return RowIndex(
        "memory",
        SPEC,
        ["a", "b"],
        [f"class {i}" for i in range(N_CLASSES)],
        np.array([f"clip{i:07d}_{i:06d}" for i in range(N_CLIPS)], dtype=object),
        rng.permutation(2**40 + np.arange(N_CLIPS)).astype(np.uint64),
        (np.arange(N_CLIPS) % N_CLASSES).astype(np.int32)[:, None],
        np.repeat([0, 1], N_CLIPS // 2).astype(np.int32),
        np.tile(np.arange(N_CLIPS // 2), 2).astype(np.int32),
    )


class MemoryReader:
    """Clips made of their class and their number, in the planned order."""

    def __init__(self, windows: WindowPlan, poison: int | None = None) -> None:
        self.windows, self.poison = windows, poison
        rng = np.random.default_rng(7)
        labels = windows.index.labels_N
        looks = rng.normal(size=(N_CLASSES, SPEC.fbank_frames, SPEC.n_mels))
        noise = rng.normal(size=(N_CLIPS, SPEC.fbank_frames, SPEC.n_mels))
        self.fbank = (3 * looks[labels] + noise).astype(np.float16)
        shape = (SPEC.frame_size, SPEC.frame_size, 3)
        base = rng.integers(0, 256, (N_CLASSES, 1, *shape))
        grain = rng.integers(-30, 30, (N_CLIPS, SPEC.n_frames, *shape))
        self.frames = np.clip(base[labels] + grain, 0, 255).astype(np.uint8)

    def stream(self, epochs: Iterable[EpochReads]) -> Iterator[Batch]:
        for reads in epochs:
            for window in self.windows.windows(reads):
                for positions, visits in zip(window.positions_Sn, window.visits_Sn, strict=True):
                    yield self._batch(positions, window.frames, window.epoch, visits)

    def sweep(self, frames: FrameDraw) -> Iterator[Batch]:
        for window in self.windows.sweep(frames):
            for positions, visits in zip(window.positions_Sn, window.visits_Sn, strict=True):
                yield self._batch(positions, frames, 0, visits)

    def _batch(
        self, positions: np.ndarray, draw: FrameDraw, epoch: int, visits: np.ndarray
    ) -> Batch:
        index = self.windows.index
        chosen = choose_frames(index.keys_N[positions], SPEC.n_frames, draw, 0, epoch, visits)
        fbank = self.fbank[positions].copy()
        if self.poison is not None:
            fbank[positions == self.poison] = np.nan
        return Batch(
            position=positions,
            key=index.keys_N[positions],
            labels=index.labels_NL[positions],
            fbank=fbank,
            frames=self.frames[positions[:, None], chosen],
        )
