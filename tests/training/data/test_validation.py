"""Validation: no video, and no whole class, on one side alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.stores import noise_store

from pipeline.config import FeatureSpec
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.store import FeatureStore
from training.config import DataConfig, TrainingConfig
from training.data.rows import RowIndex, clip_keys
from training.data.validation import split_validation
from training.errors import TrainingError
from training.run.pinned import Pinned, pin

SPEC = FeatureSpec(n_frames=1, frame_size=16, fbank_frames=8, n_mels=8)


def index_of(labels: list[int], ids: list[str] | None = None) -> RowIndex:
    n = len(labels)
    ids = ids or [f"clip{i}" for i in range(n)]
    classes = [f"class {i}" for i in range(max(labels) + 1)]
    zeros = np.zeros(n, np.int32)
    ids_N = np.array(ids, dtype=object)
    labels_N = np.array(labels, np.int64)
    return RowIndex(
        "memory", SPEC, ["a"], classes, ids_N, clip_keys(ids), labels_N[:, None], zeros, zeros
    )


def names(*groups: object) -> np.ndarray:
    return np.array([str(group) for group in groups], dtype=object)


def store_of(
    folder: Path, ids: list[str], labels: list[str | None], groups: list[str | None]
) -> str:
    """A store whose clips table says so; there are no shards."""
    store = FeatureStore.create(str(folder / "store"), SPEC)
    rows = [
        {
            "clip_id": clip_id, "label": label, "group": group, "split": "train", "status": "ok",
            "row_key": clip_id, "shard": "features/part-x.parquet", "row": row,
            "spec_hash": SPEC.spec_hash(),
        }
        for row, (clip_id, label, group) in enumerate(zip(ids, labels, groups, strict=True))
    ]  # fmt: skip
    store.append(pa.Table.from_pylist(rows, CLIPS_SCHEMA), {})
    return store.uri


def pinned(uri: str, frac: float = 0.1) -> Pinned:
    return pin(uri, None, TrainingConfig(data=DataConfig(validation_frac=frac)))


def test_ids_that_end_in_numbers_hold_out_clips_not_classes(tmp_path: Path) -> None:
    labels = [name for name in ("dog", "cat", "bird", "horse") for _ in range(50)]
    ids = [f"{label}_{i:04d}" for i, label in enumerate(labels)]
    data = pinned(store_of(tmp_path, ids, labels, ids))
    assert data.validation is not None
    assert set(data.train.labels_N) == set(data.validation.labels_N) == {0, 1, 2, 3}
    assert 8 <= len(data.validation) <= 40


def test_the_clips_of_a_group_stay_together(tmp_path: Path) -> None:
    groups = [f"recording {i // 4}" for i in range(200)]
    ids = [f"clip_{i:05d}" for i in range(200)]
    data = pinned(store_of(tmp_path, ids, ["dog"] * 200, groups))
    assert data.validation is not None
    of = dict(zip(ids, groups, strict=True))
    sides = [{of[c] for c in part.clip_ids_N} for part in (data.train, data.validation)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_rows_without_a_group_are_split_by_the_youtube_id_in_their_name(tmp_path: Path) -> None:
    ids = [f"video{i // 2:06d}_{i:06d}" for i in range(200)]
    data = pinned(store_of(tmp_path, ids, [None] * 200, [None] * 200))
    assert data.validation is not None
    sides = [{c[:11] for c in part.clip_ids_N} for part in (data.train, data.validation)]
    assert all(sides)
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("seed", range(20))
def test_every_class_of_two_groups_is_on_both_sides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 12, 60).tolist() + list(range(12)) * 2
    groups = names(*rng.integers(0, 40, 60), *range(100, 124))
    train, held = split_validation(index_of(labels), groups, 0.05)
    assert set(train.labels_N) == set(held.labels_N) == set(range(12))
    assert len(train) + len(held) == len(labels)


def test_a_class_of_one_group_is_trained_on_and_told(caplog: pytest.LogCaptureFixture) -> None:
    labels = [0] * 40 + [1] * 5
    groups = names(*range(40), *["alone"] * 5)
    for frac in (0.1, 0.9):
        train, held = split_validation(index_of(labels), groups, frac)
        assert set(train.labels_N) == {0, 1}
        assert set(held.labels_N) == {0}
    assert "no clip of 1 classes of a single group, such as 'class 1'" in caplog.text


def test_classes_that_cannot_be_divided_are_refused_by_name() -> None:
    labels = [0] * 10 + [1] * 10
    with pytest.raises(TrainingError, match=r"'class 0' has all its clips in group 'a'.*column"):
        split_validation(index_of(labels), names(*"a" * 10, *"b" * 10), 0.5)


def test_the_split_hangs_on_names_alone() -> None:
    labels = [i % 3 for i in range(90)]
    index = index_of(labels)
    order = np.random.default_rng(0).permutation(90)
    groups = names(*range(90))
    _, held = split_validation(index, groups, 0.2)
    _, again = split_validation(index.take(order), groups[order], 0.2)
    assert set(held.clip_ids_N) == set(again.clip_ids_N)


def test_unlabelled_clips_are_split_too(tmp_path: Path) -> None:
    store = noise_store(tmp_path / "store", SPEC, 200, labelled=False)
    data = pinned(store.uri)
    assert data.validation is not None
    assert len(data.train) + len(data.validation) == 200
    assert len(data.validation) > 5
