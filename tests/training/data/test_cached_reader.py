"""A reader with a cache: the batches of one without, and no request in a later sweep or epoch."""

import pytest
from support.asked import asked_of_shards, forget
from support.batches import same_batches
from support.stores import noise_store

from pipeline.config import FeatureSpec
from training.cluster_config import ScaleConfig
from training.config import DataConfig
from training.data.order import BatchPlan, EpochReads, FrameDraw, WindowPlan
from training.data.reader import LocalReader
from training.data.rows import RowIndex, index_rows

SPEC = FeatureSpec(n_frames=3, frame_size=32, fbank_frames=16, n_mels=8)
N_CLIPS = 300
EPOCHS = [EpochReads(0, 0, FrameDraw(1)), EpochReads(1, 0, FrameDraw(1))]


@pytest.fixture(scope="module")
def index(bucket: str) -> RowIndex:
    return index_rows(noise_store(f"{bucket}/store", SPEC, N_CLIPS).snapshot(), "train")


@pytest.fixture
def windows(index: RowIndex) -> WindowPlan:
    data = DataConfig(lanes=4, shuffle_window=16)
    plan = WindowPlan(index, BatchPlan.of(len(index), 16, data), range(4), seed=3)
    forget()
    return plan


def test_a_second_sweep_asks_storage_for_nothing_and_no_batch_differs(windows, tmp_path) -> None:
    ours = LocalReader(windows, ScaleConfig(shard_cache=str(tmp_path)).cache)
    expected = list(LocalReader(windows).sweep(FrameDraw(1)))
    forget()
    assert same_batches(list(ours.sweep(FrameDraw(1))), expected)
    assert asked_of_shards()
    forget()
    assert same_batches(list(ours.sweep(FrameDraw(1))), expected)
    assert not asked_of_shards()


def test_epochs_in_orders_of_their_own_are_read_from_what_a_sweep_kept(windows, tmp_path) -> None:
    ours = LocalReader(windows, ScaleConfig(shard_cache=str(tmp_path)).cache)
    expected = list(LocalReader(windows).stream(EPOCHS))
    forget()
    list(ours.sweep(FrameDraw(1)))
    forget()
    assert same_batches(list(ours.stream(EPOCHS)), expected)
    assert not asked_of_shards()
