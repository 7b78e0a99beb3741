"""DecodedFeatures: every clip of a store decoded once into files that processes map into memory.

Knows nothing of models or loops. Invariant: `MappedReader` gives the batches of `LocalReader`, bit
for bit; processes that map one folder share its pages.

features/  frames.npy  fbank.npy  keys.npy  features.json (written last)

Shapes: N clips of the store, n of a step, F stored frames, H x W pixels, T fbank frames, M mel
bins.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from pipeline.config import FeatureSpec
from pipeline.store.store import Snapshot
from training.data.order import EpochReads, FrameDraw, Window, WindowPlan, window_of
from training.data.reader import Batch, choose_frames, read_window
from training.data.rows import RowIndex, index_rows
from training.errors import TrainingError

_Mapped = np.memmap[Any, np.dtype[Any]]

_CLIPS = 256
"""Clips decoded at a time."""


class DecodedFeatures(NamedTuple):
    """Features of clips, looked up by key."""

    spec: FeatureSpec
    keys_N: NDArray[np.uint64]
    """Sorted."""
    frames_NFHWC: NDArray[np.uint8]
    fbank_NTM: NDArray[np.float16]

    def read(self, window: Window) -> Iterator[Batch]:
        """The steps of a window, as `read_window` decodes them."""
        for places_n, visits_n in zip(window.places_Sn, window.visits_Sn, strict=True):
            keys_n = window.key_W[places_n]
            chosen_nf = choose_frames(
                keys_n, self.spec.n_frames, window.frames, window.seed, window.epoch, visits_n
            )
            rows_n = np.searchsorted(self.keys_N, keys_n)
            yield Batch(
                position=window.position_W[places_n],
                key=keys_n,
                labels=window.labels_WL[places_n],
                fbank=self.fbank_NTM[rows_n],
                frames=self.frames_NFHWC[rows_n[:, None], chosen_nf],
            )


class MappedReader:
    """Implements `Reader` over decoded features: a step costs a copy."""

    def __init__(self, windows: WindowPlan, features: DecodedFeatures) -> None:
        self.windows, self.features = windows, features

    def stream(self, epochs: Iterable[EpochReads]) -> Iterator[Batch]:
        """See `Reader`."""
        for reads in epochs:
            for window in self.windows.windows(reads):
                yield from self.features.read(window)

    def sweep(self, frames: FrameDraw) -> Iterator[Batch]:
        """See `Reader`."""
        for window in self.windows.sweep(frames):
            yield from self.features.read(window)


def decode_store(snapshot: Snapshot, folder: Path) -> None:
    """Decode all usable clips of a version into `folder`, unless they lie there.

    Raises: TrainingError if they would not fit into memory.
    """
    about = {"digest": snapshot.digest, "spec": snapshot.spec.spec_hash()}
    marker = folder / "features.json"
    if marker.exists() and json.loads(marker.read_text()) == about:
        return
    shutil.rmtree(folder, ignore_errors=True)
    parts = [index_rows(snapshot, split) for split in _splits(snapshot)]
    keys_N = np.sort(np.concatenate([part.keys_N for part in parts]))
    _refuse_too_large(snapshot.spec, len(keys_N))
    folder.mkdir(parents=True)
    np.save(folder / "keys.npy", keys_N)
    frames, fbank = _arrays(snapshot.spec, len(keys_N), folder)
    for part in parts:
        for batch in _decoded(part):
            rows_n = np.searchsorted(keys_N, batch.key)
            frames[rows_n], fbank[rows_n] = batch.frames, batch.fbank
    for array in (frames, fbank):
        array.flush()
    scratch = folder / "features.tmp"
    scratch.write_text(json.dumps(about))
    os.replace(scratch, marker)


def open_features(folder: Path, spec: FeatureSpec) -> DecodedFeatures:
    """Map what `decode_store` wrote, to be read only."""
    frames, fbank = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("frames", "fbank"))
    return DecodedFeatures(spec, np.load(folder / "keys.npy"), frames, fbank)


def _splits(snapshot: Snapshot) -> list[str]:
    return sorted(set(snapshot.rows(None)["split"].to_pylist()))


def _decoded(index: RowIndex) -> Iterator[Batch]:
    """All clips with all their frames."""
    every = FrameDraw(index.spec.n_frames, random=False)
    for start in range(0, len(index), _CLIPS):
        positions = np.arange(start, min(start + _CLIPS, len(index)))
        yield from read_window(window_of(index, positions[None], every))


def _arrays(spec: FeatureSpec, n_clips: int, folder: Path) -> tuple[_Mapped, _Mapped]:
    """Frames and fbanks, in files."""
    size = spec.frame_size
    frames = np.lib.format.open_memmap(
        folder / "frames.npy", "w+", np.uint8, (n_clips, spec.n_frames, size, size, 3)
    )
    fbank = np.lib.format.open_memmap(
        folder / "fbank.npy", "w+", np.float16, (n_clips, spec.fbank_frames, spec.n_mels)
    )
    return frames, fbank


def _refuse_too_large(spec: FeatureSpec, n_clips: int) -> None:
    """Pages that do not fit would be read from disk again at every step."""
    each = spec.n_frames * spec.frame_size**2 * 3 + spec.fbank_frames * spec.n_mels * 2
    needed, free = each * n_clips, psutil.virtual_memory().available
    if needed > free:
        raise TrainingError(
            f"{n_clips:,} clips are {needed / 1e9:.1f} GB decoded, and {free / 1e9:.1f} GB of "
            "memory are free: leave --processes out to train on Ray, which decodes as it reads, or "
            "ingest fewer or smaller frames"
        )
