"""Batches decoded in Ray tasks are those decoded here, whatever happens to the tasks."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from support.asked import asked_of_shards
from support.batches import same_batches
from support.polling import wait_until
from support.processes import below, kill
from support.stores import noise_store

from pipeline.config import FeatureSpec
from pipeline.storage import Location
from training.attempt import UNHELD
from training.cluster_config import ScaleConfig
from training.config import DataConfig
from training.data.order import BatchPlan, EpochReads, FrameDraw, Window, WindowPlan
from training.data.reader import Batch, LocalReader
from training.data.rows import RowIndex, index_rows
from training.loop.hooks import World
from training.on_ray import fit
from training.on_ray.reader import RayReader
from training.run.edge import Written

SPEC = FeatureSpec(n_frames=3, frame_size=32, fbank_frames=16, n_mels=8)
N_CLIPS = 300
READING = "ray::read"
"""Title of a process that decodes a window now; idle ones have another."""
EPOCHS = [EpochReads(0, 5, FrameDraw(1)), EpochReads(1, 0, FrameDraw(2, 2))]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> RowIndex:
    store = noise_store(tmp_path_factory.mktemp("reader") / "store", SPEC, N_CLIPS)
    return index_rows(store.snapshot(), "train")


@pytest.fixture
def windows(index: RowIndex) -> WindowPlan:
    return windows_of(index)


def windows_of(index: RowIndex, shuffle_window: int = 16) -> WindowPlan:
    data = DataConfig(lanes=4, shuffle_window=shuffle_window)
    return WindowPlan(index, BatchPlan.of(len(index), 16, data), range(1, 3), seed=3)


def _local(index: RowIndex) -> list[Batch]:
    return list(LocalReader(windows_of(index)).stream(EPOCHS))


@pytest.mark.parametrize("tasks", [1, 3])
def test_tasks_give_the_batches_of_one_process(
    ray_session: None, windows: WindowPlan, tasks: int
) -> None:
    ours, local = RayReader(windows, tasks, cpus=0.5), LocalReader(windows)
    expected = list(local.stream(EPOCHS))
    assert len(expected) == 2 * windows.plan.steps(N_CLIPS) - 5
    assert same_batches(list(ours.stream(EPOCHS)), expected)
    assert same_batches(list(ours.sweep(FrameDraw(1))), list(local.sweep(FrameDraw(1))))


@pytest.mark.parametrize("n_steps", [1, 3])
def test_windows_of_few_steps_wait_for_training_too(
    ray_session: None, index: RowIndex, n_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is decoded at once, so that no task was ever found running: reading never stopped."""
    windows, started = windows_of(index, shuffle_window=4 * n_steps), 0
    assert windows.plan.window_steps == n_steps

    def counted(reads: EpochReads) -> Iterator[Window]:
        nonlocal started
        for window in WindowPlan.windows(windows, reads):
            started += len(window.places_Sn)
            yield window

    monkeypatch.setattr(windows, "windows", counted)
    ahead: list[int] = []
    epochs = [EpochReads(epoch, 0, FrameDraw(1)) for epoch in range(2)]
    for n, _ in enumerate(RayReader(windows, 2, cpus=0.5).stream(epochs), 1):
        wait_until(lambda: not below(READING), 60, "the end of all readers")
        ahead.append(started - n)
    assert len(ahead) == 2 * windows.plan.steps(N_CLIPS)
    # Of two tasks with four steps each; a window is started whole.
    assert 2 * n_steps <= max(ahead) < 2 * 4 + n_steps


def _far(index: RowIndex, bucket: str) -> WindowPlan:
    """Of a store behind plain HTTP, which needs no keys: the tasks have none."""
    store, name_of = noise_store(f"{bucket}/store", SPEC, N_CLIPS), bucket.removeprefix("s3://")
    for name in store.location.files("features"):
        key = f"store/features/{name}"
        boto3.client("s3").put_object_acl(Bucket=name_of, Key=key, ACL="public-read")
    far = f"{os.environ['AWS_ENDPOINT_URL']}/{name_of}/store"
    return windows_of(dataclasses.replace(index, store_uri=far))


def test_tasks_keep_what_they_read_on_their_node(
    ray_session: None, bucket: str, index: RowIndex, tmp_path: Path
) -> None:
    windows = _far(index, bucket)
    cache = ScaleConfig(shard_cache=str(tmp_path)).cache
    assert same_batches(list(RayReader(windows, 2, 0.5, cache).stream(EPOCHS)), _local(index))
    for kept in (True, False):
        asked_of_shards()
        list(RayReader(windows, 2, 0.5, cache if kept else None).stream(EPOCHS))
        assert bool(asked_of_shards()) != kept


def test_tasks_of_a_node_that_can_keep_nothing_read_the_same(
    ray_session: None, bucket: str, index: RowIndex, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    cache = ScaleConfig(shard_cache=str(tmp_path / "file" / "shards")).cache
    tasks = RayReader(_far(index, bucket), 2, 0.5, cache)
    assert same_batches(list(tasks.stream(EPOCHS)), _local(index))


def test_a_training_worker_has_its_readers_keep_what_they_read(
    windows: WindowPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "this_world", lambda scale: World())
    monkeypatch.setattr(fit, "last_state", lambda: None)
    written = Written(Location(tmp_path), {}, UNHELD)
    for folder in (None, "/mnt/shards"):
        scale = ScaleConfig(shard_cache=folder)
        assert fit.this_edge(scale, written, "pretrain").reader(windows).cache == scale.cache
        assert (scale.cache is None) == (folder is None)


@pytest.mark.slow
def test_a_reader_killed_on_the_way_changes_nothing(ray_session: None, windows: WindowPlan) -> None:
    found: list[Batch] = []
    n_killed = 0
    for batch in RayReader(windows, 2, cpus=0.5).stream(EPOCHS):
        found.append(batch)
        if n_killed < 2:
            n_killed += kill(READING)
    assert n_killed, "no reader was running"
    assert same_batches(found, list(LocalReader(windows).stream(EPOCHS)))


def test_reading_that_is_given_up_leaves_no_task_behind(
    ray_session: None, windows: WindowPlan
) -> None:
    stream = RayReader(windows, 2, cpus=0.5).stream(EPOCHS)
    next(stream)
    assert below(READING)
    stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: not below(READING), 60, "the end of all readers")
