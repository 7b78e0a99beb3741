"""Features decoded once: the batches of a reader that decodes, and what is refused."""

from pathlib import Path

import numpy as np
import psutil
import pytest
from support.batches import same_batch
from support.stores import noise_store

from pipeline.config import FeatureSpec
from training.config import DataConfig
from training.data.order import (
    BatchPlan,
    EpochReads,
    FrameDraw,
    WindowPlan,
    balanced_draws,
    lanes_of,
)
from training.data.reader import Batch, LocalReader
from training.data.rows import index_rows
from training.errors import TrainingError
from training.lab import features
from training.lab.features import MappedReader, decode_store, open_features

SPEC = FeatureSpec(n_frames=3, frame_size=16, fbank_frames=16, n_mels=8, duration_s=1.0)
DATA = DataConfig(lanes=2, shuffle_window=8)


def test_mapped_features_are_those_a_reader_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = noise_store(tmp_path / "store", SPEC, 40)
    snapshot = store.snapshot()
    decode_store(snapshot, tmp_path / "features")
    index = index_rows(snapshot, "train").take(np.arange(40) % 5 > 0)  # As if some were held out.
    plan = BatchPlan.of(len(index), 8, DATA)
    windows = WindowPlan(index, plan, range(2), seed=3)
    mapped = MappedReader(windows, open_features(tmp_path / "features", SPEC))
    decoded = LocalReader(windows)
    draw = FrameDraw(2, n_views=2)
    for epoch in (0, 1):
        mine = list(mapped.stream([EpochReads(epoch, 1, draw)]))
        theirs = list(decoded.stream([EpochReads(epoch, 1, draw)]))
        assert len(mine) == len(index) // 8 - 1
        assert all(map(same_batch, mine, theirs))
    others = decoded.stream([EpochReads(0, 1, draw)])
    assert not any(map(same_batch, mine, others)), "epochs do not differ: nothing is compared"
    middle = FrameDraw(1, random=False)
    assert all(map(same_batch, mapped.sweep(middle), decoded.sweep(middle)))
    monkeypatch.setattr(features, "_decoded", lambda index: pytest.fail("decoded again"))
    decode_store(snapshot, tmp_path / "features")


def test_a_clip_that_an_epoch_draws_again_shows_other_frames(tmp_path: Path) -> None:
    """It showed one frame as often as it was drawn; neither resuming nor workers change which."""
    spec = SPEC.model_copy(update={"n_frames": 8})
    snapshot = noise_store(tmp_path / "store", spec, 40).snapshot()
    decode_store(snapshot, tmp_path / "features")
    index = index_rows(snapshot, "train")
    # One clip of a class that is drawn as often as the other 30.
    index = index.take((index.labels_N > 0) | (index.clip_ids_N == "clip0000000_000000"))
    plan, draws = BatchPlan.of(len(index), 4, DATA), balanced_draws(index, seed=3)

    def read(lanes: range, first_step: int = 0, balanced: bool = True) -> list[Batch]:
        windows = WindowPlan(index, plan, lanes, 3, draws if balanced else None)
        reads = [EpochReads(0, first_step, FrameDraw(1))]
        batches = list(LocalReader(windows).stream(reads))
        mapped = MappedReader(windows, open_features(tmp_path / "features", spec))
        assert all(map(same_batch, batches, mapped.stream(reads)))
        return batches

    def shown(batches: list[Batch]) -> dict[int, list[bytes]]:
        seen: dict[int, list[bytes]] = {}
        for batch in batches:
            for key, frames in zip(batch.key.tolist(), batch.frames, strict=True):
                seen.setdefault(key, []).append(frames.tobytes())
        return seen

    whole, once = read(range(2)), shown(read(range(2), balanced=False))
    seen = shown(whole)
    often = max(seen.values(), key=len)
    assert len(often) >= 6
    assert len(set(often)) >= 4, "of 8 stored frames"
    first = {key: frames[0] for key, frames in seen.items() if key in once}
    assert first == {key: once[key][0] for key in first}, "a first visit draws what it drew before"
    assert all(map(same_batch, read(range(2), first_step=4), whole[4:]))
    workers = [read(lanes_of(rank, 2, 2)) for rank in range(2)]
    joined = [
        Batch(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
        for batches in zip(*workers, strict=True)
    ]
    assert all(map(same_batch, joined, whole))


def test_features_larger_than_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = noise_store(tmp_path / "store", SPEC, 8).snapshot()
    memory = psutil.virtual_memory()._replace(available=8 * 3 * 16 * 16 * 3)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(TrainingError, match="leave --processes out"):
        decode_store(snapshot, tmp_path / "features")
    assert not (tmp_path / "features").exists()
