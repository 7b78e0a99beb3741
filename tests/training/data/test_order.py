"""The order of clips: complete, repeatable, and the same for any number of workers."""

import pickle

import numpy as np
import pytest

from pipeline.config import FeatureSpec
from training.config import DataConfig
from training.data.order import (
    BatchPlan,
    EpochReads,
    FrameDraw,
    WindowPlan,
    balanced_draws,
    epoch_order,
    lanes_of,
)
from training.data.reader import choose_frames
from training.data.rows import RowIndex, clip_keys
from training.errors import TrainingError


def _index(n: int, shard_rows: int = 256) -> RowIndex:
    ids = [f"video{i // 2:06d}_{i:06d}" for i in range(n)]
    return RowIndex(
        "memory",
        FeatureSpec(),
        [f"shard-{i}" for i in range(-(-n // shard_rows))],
        ["x", "y"],
        np.array(ids, dtype=object),
        clip_keys(ids),
        (np.arange(n) % 10 == 0).astype(np.int32)[:, None],
        (np.arange(n) // shard_rows).astype(np.int32),
        (np.arange(n) % shard_rows).astype(np.int32),
    )


@pytest.mark.parametrize(("n", "batch_size"), [(1000, 64), (4096, 256), (333, 32)])
def test_an_epoch_visits_no_clip_twice_and_drops_less_than_a_batch(n: int, batch_size: int) -> None:
    plan = BatchPlan.of(n, batch_size, DataConfig(lanes=8))
    order = epoch_order(_index(n), plan, seed=0, epoch=0)
    assert order.size == n // batch_size * batch_size
    assert len(np.unique(order)) == order.size


def test_no_clip_of_a_small_store_is_left_out_of_every_epoch() -> None:
    """One row group, whose last 13 clips are less than a batch."""
    index, plan = _index(45), BatchPlan.of(45, 32, DataConfig(lanes=8))
    epochs = [epoch_order(index, plan, seed=0, epoch=epoch) for epoch in range(12)]
    assert len(np.unique(np.concatenate(epochs))) == 45


def test_epochs_and_seeds_differ_and_repeat() -> None:
    index, plan = _index(1024), BatchPlan.of(1024, 64, DataConfig())
    first = epoch_order(index, plan, 0, 0)
    assert np.array_equal(first, epoch_order(index, plan, 0, 0))
    assert not np.array_equal(first, epoch_order(index, plan, 0, 1))
    assert not np.array_equal(first, epoch_order(index, plan, 1, 0))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_workers_together_read_the_same_global_batches(size: int) -> None:
    index, plan = _index(1024), BatchPlan.of(1024, 64, DataConfig(lanes=8))
    whole = epoch_order(index, plan, 0, 3)
    for step in (0, 7, len(whole) - 1):
        parts = []
        for rank in range(size):
            windows = WindowPlan(index, plan, lanes_of(rank, size, 8), 0)
            rows = np.concatenate(
                [w.positions_Sn for w in windows.windows(EpochReads(3, 0, FrameDraw(1)))]
            )
            parts.append(rows[step])
        assert np.array_equal(np.concatenate(parts), whole[step].ravel())


def test_reading_can_start_at_any_step() -> None:
    index, plan = _index(2048), BatchPlan.of(2048, 64, DataConfig(shuffle_window=32))
    windows = WindowPlan(index, plan, range(8), 0)
    reads = EpochReads(1, 0, FrameDraw(1))
    whole = np.concatenate([w.positions_Sn for w in windows.windows(reads)])
    for first in (1, 5, 17, len(whole) - 1):
        tail = [w.positions_Sn for w in windows.windows(EpochReads(1, first, FrameDraw(1)))]
        assert np.array_equal(np.concatenate(tail), whole[first:])


def test_a_window_touches_few_row_groups() -> None:
    index = _index(64 * 512)
    plan = BatchPlan.of(len(index), 256, DataConfig(lanes=8, shuffle_window=256))
    order = epoch_order(index, plan, 0, 0)
    window = order[: plan.window_steps].transpose(1, 0, 2).reshape(8, -1)
    for lane in window:
        groups = set(zip(index.shards_N[lane], index.rows_N[lane] // 64, strict=True))
        assert len(groups) <= len(lane) // 64 + 2


def test_a_sweep_visits_every_clip_once() -> None:
    index, plan = _index(1003), BatchPlan.of(1003, 64, DataConfig(lanes=8))
    seen = [
        w.positions_Sn.ravel()
        for rank in range(4)
        for w in WindowPlan(index, plan, lanes_of(rank, 4, 8), 0).sweep(FrameDraw(1, random=False))
    ]
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(1003))


def test_any_number_of_workers_shares_out_the_lanes() -> None:
    for size in range(1, 9):
        shares = [lanes_of(rank, size, 8) for rank in range(size)]
        assert [lane for share in shares for lane in share] == list(range(8))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert BatchPlan(24, 8, 1).rows_of_workers(3) == (6, 9, 9)


def test_more_workers_than_lanes_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"data.lanes = 8 are too few for 9 workers"):
        lanes_of(0, 9, 8)


def test_frames_come_from_each_segment_and_views_differ() -> None:
    keys = clip_keys([f"c{i}" for i in range(200)])
    first = np.zeros(200, np.int64)
    chosen = choose_frames(keys, 10, FrameDraw(frames_per_clip=2, n_views=2), 0, 0, first)
    assert chosen.shape == (200, 4)
    assert (chosen[:, [0, 2]] < 5).all()
    assert (chosen[:, [1, 3]] >= 5).all()
    assert (chosen[:, 0] != chosen[:, 2]).any()
    assert set(np.unique(chosen)) == set(range(10))
    fixed = choose_frames(keys, 10, FrameDraw(frames_per_clip=1, random=False), 0, 5, first)
    assert (fixed == 5).all()


def test_balanced_draws_even_out_the_classes() -> None:
    index = _index(5000)
    drawn = index.labels_N[balanced_draws(index, seed=0)(epoch=0)]
    assert 0.45 < drawn.mean() < 0.55
    assert index.labels_N.mean() == pytest.approx(0.1)


def _vggsound() -> RowIndex:
    """Rows, shards and class sizes of the real train split, without its features."""
    n, n_classes = 183_730, 309
    rng = np.random.default_rng(0)
    sizes = rng.permutation(np.geomspace(1.0, 9.0, n_classes))
    labels = rng.choice(n_classes, n, p=sizes / sizes.sum())
    ids = [f"video{i:08d}_000000" for i in range(n)]
    classes = [f"class {i}" for i in range(n_classes)]
    # Some clips of a shard are of the test split.
    places = np.flatnonzero(np.arange(199_176) % 13)[:n]
    return RowIndex(
        "memory",
        FeatureSpec(),
        [f"shard-{i}" for i in range(places[-1] // 256 + 1)],
        classes,
        np.array(ids, dtype=object),
        np.arange(n).astype(np.uint64),
        labels.astype(np.int32)[:, None],
        (places // 256).astype(np.int32),
        (places % 256).astype(np.int32),
    )


def _n_groups(shards: np.ndarray, rows: np.ndarray) -> int:
    return len(np.unique(shards.astype(np.int64) << 32 | rows // 64))


@pytest.mark.parametrize("balanced", [False, True])
def test_an_epoch_of_eight_workers_reads_little_more_than_every_row_group_once(
    balanced: bool,
) -> None:
    index = _vggsound()
    draws = balanced_draws(index, seed=0) if balanced else None
    plan = BatchPlan.of(len(index), 48, DataConfig(lanes=8))
    n_read = n_draws = 0
    for rank in range(8):
        windows = WindowPlan(index, plan, lanes_of(rank, 8, 8), 0, draws)
        for window in windows.windows(EpochReads(0, 0, FrameDraw(1))):
            n_read += _n_groups(window.shard_W, window.row_W)
            n_draws += window.places_Sn.size
    n_groups = _n_groups(index.shards_N, index.rows_N)
    assert n_draws == len(index) // 48 * 48
    assert n_read <= 1.3 * n_groups
    if draws is not None:
        drawn = index.labels_N[draws(0)]
        counts = np.bincount(drawn, minlength=len(index.classes))
        assert counts.max() < 1.4 * counts.min(), "not balanced"


def test_a_window_travels_without_the_other_clips_of_the_store() -> None:
    data = DataConfig(lanes=8, shuffle_window=64)
    small, large = _index(2048), _index(64 * 2048)
    sizes = []
    for index in (small, large):
        plan = BatchPlan.of(len(index), 64, data)
        windows = WindowPlan(index, plan, range(1), 0).windows(EpochReads(0, 0, FrameDraw(1)))
        sizes.append(len(pickle.dumps(next(windows))))
    assert sizes[1] < 1.2 * sizes[0] < 12_000
