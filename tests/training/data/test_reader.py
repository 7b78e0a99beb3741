"""LocalReader: the clips of a window come from many shards at once, with the bits of each."""

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stores import noise_store

from pipeline.config import FeatureSpec
from pipeline.decode.payload import decode_jpegs, fbank_array
from pipeline.errors import DamagedShard
from pipeline.store.shards import AT_ONCE, read_rows
from pipeline.store.store import FeatureStore
from training.config import DataConfig
from training.data import rows
from training.data.order import BatchPlan, EpochReads, FrameDraw, WindowPlan
from training.data.reader import LocalReader
from training.data.rows import index_rows
from training.errors import TrainingError

SPEC = FeatureSpec(n_frames=1, frame_size=32, fbank_frames=16, n_mels=8)
N_CLIPS = 120
N_SHARDS = 12
ONCE = EpochReads(0, 0, FrameDraw(1))


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return noise_store(tmp_path / "store", SPEC, N_CLIPS, shards=N_SHARDS)


def reader(store: FeatureStore) -> LocalReader:
    """All clips are one window."""
    index = index_rows(store.snapshot(), "train")
    data = DataConfig(lanes=2, shuffle_window=N_CLIPS)
    return LocalReader(WindowPlan(index, BatchPlan.of(len(index), 20, data), range(2), seed=0))


def test_every_clip_has_the_bits_of_its_row(store: FeatureStore) -> None:
    ours = reader(store)
    index, seen = ours.windows.index, []
    for batch in ours.stream([ONCE]):
        for i, position in enumerate(batch.position.tolist()):
            shard, row = index.shards[index.shards_N[position]], index.rows_N[position]
            (stored,) = read_rows(
                store.uri, shard, np.array([row]), ["frames", "fbank"]
            ).to_pylist()
            assert np.array_equal(batch.fbank[i], fbank_array(stored["fbank"], SPEC))
            assert np.array_equal(batch.frames[i], decode_jpegs(stored["frames"]))
            seen.append(position)
    assert sorted(seen) == list(range(N_CLIPS))


def test_two_clips_of_one_key_are_refused(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels and rows of the bank go by keys."""
    keys_N = index_rows(store.snapshot(), "train").keys_N.copy()
    keys_N[-1] = keys_N[0]
    monkeypatch.setattr(rows, "clip_keys", lambda clip_ids: keys_N)
    with pytest.raises(TrainingError, match="two clip ids share a 64-bit key"):
        index_rows(store.snapshot(), "train")


def test_shards_of_a_window_are_waited_for_together(store, monkeypatch) -> None:
    """A storage that answers once `AT_ONCE` shards were asked for."""
    kind = type(store.location.fs)
    original = kind.open
    asked = threading.Barrier(AT_ONCE)
    opening = itertools.count()

    def opened(self: Any, name: str, mode: str = "rb", **options: Any) -> Any:
        if "/features/" in str(name) and next(opening) < AT_ONCE:
            asked.wait(30)
        return original(self, name, mode, **options)

    monkeypatch.setattr(kind, "open", opened)
    batches = list(reader(store).stream([ONCE]))
    monkeypatch.undo()
    assert [batch.position.tolist() for batch in batches] == [
        batch.position.tolist() for batch in reader(store).stream([ONCE])
    ]


def test_a_missing_shard_is_named(store: FeatureStore) -> None:
    shard = sorted(Path(store.uri, "features").iterdir())[7]
    shard.unlink()
    with pytest.raises(DamagedShard, match=shard.name):
        list(reader(store).stream([ONCE]))
