"""What a node keeps of shards in a real S3 API: no request twice, its limit, and its faults."""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from support.asked import asked_of_shards, forget
from support.stores import noise_store
from support.unsteady import Unsteady

from pipeline.config import FeatureSpec
from pipeline.errors import DamagedShard, StoreError
from pipeline.store import cached
from pipeline.store.cached import SILENT_S, ShardCache
from pipeline.store.schema import ROW_GROUP_ROWS
from pipeline.store.shards import read_rows
from pipeline.store.store import FeatureStore

SPEC = FeatureSpec(n_frames=1, frame_size=32, duration_s=1.0, fbank_frames=100, n_mels=16)
N_SHARDS = 2
SHARD_ROWS = 3 * ROW_GROUP_ROWS
ALL = np.arange(SHARD_ROWS)
COLUMNS = ["frames", "fbank"]
ROOMY = 2**30


@pytest.fixture(scope="module")
def store(bucket: str) -> FeatureStore:
    """Row groups of about 0.3 MB, three in each shard."""
    return noise_store(f"{bucket}/store", SPEC, N_SHARDS * SHARD_ROWS)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """As a process that was just started."""
    forget()
    yield
    forget()


def shard_of(store: FeatureStore, number: int = 0) -> str:
    return f"features/{sorted(store.location.files('features'))[number]}"


def read(store: FeatureStore, cache: ShardCache | None, number: int = 0) -> pa.Table:
    return read_rows(store.uri, shard_of(store, number), ALL, COLUMNS, cache=cache)


def units(folder: Path) -> list[Path]:
    """Row groups that are kept."""
    return sorted(p for p in folder.rglob("[0-9]*-*") if p.is_file() and not p.suffix)


def test_what_a_node_has_read_once_costs_no_request_also_in_a_new_process(store, tmp_path) -> None:
    cache = ShardCache(str(tmp_path), ROOMY)
    expected = read(store, None)
    asked_of_shards()
    assert read(store, cache).equals(expected)
    assert len(asked_of_shards()) == 2 + 3  # Size, end, row groups.
    for new_process in (False, True):
        if new_process:
            forget()
        assert read(store, cache).equals(expected)
        assert not asked_of_shards()
    some = np.array([ROW_GROUP_ROWS + 1, 3])
    assert read_rows(store.uri, shard_of(store), some, ["clip_id"], cache=cache).equals(
        read_rows(store.uri, shard_of(store), some, ["clip_id"])
    )


def test_only_the_row_groups_that_are_read_are_kept(store, tmp_path) -> None:
    cache = ShardCache(str(tmp_path), ROOMY)
    read_rows(store.uri, shard_of(store), ALL[70:80], COLUMNS, cache=cache)
    assert len(units(tmp_path)) == 1


def test_a_store_on_a_disk_is_not_copied(tmp_path) -> None:
    local = noise_store(tmp_path / "store", SPEC, N_SHARDS * 4)
    cache = ShardCache(str(tmp_path / "cache"), ROOMY)
    read_rows(local.uri, shard_of(local), None, COLUMNS, cache=cache)
    assert not (tmp_path / "cache").exists()


def test_the_limit_holds_and_what_came_first_stays(store, tmp_path) -> None:
    read(store, ShardCache(str(tmp_path / "whole"), ROOMY))
    sizes = [unit.stat().st_size for unit in units(tmp_path / "whole")]
    (tail,) = (tmp_path / "whole").rglob("tail-*")
    limit = tail.stat().st_size + sum(sizes[:2]) + sizes[2] // 2
    cache = ShardCache(str(tmp_path / "small"), limit)
    expected = read(store, None), read(store, None, 1)
    assert read(store, cache).equals(expected[0])
    first = units(tmp_path / "small")
    assert len(first) == 2
    assert read(store, cache, 1).equals(expected[1])
    assert units(tmp_path / "small") == first
    asked_of_shards()
    assert read(store, cache).equals(expected[0])
    assert len(asked_of_shards()) == 1  # The third row group.


def test_units_of_a_store_that_nobody_reads_make_room_oldest_first(
    bucket, store, tmp_path, monkeypatch
) -> None:
    other = noise_store(f"{bucket}/other", SPEC, N_SHARDS * SHARD_ROWS)
    roomy = ShardCache(str(tmp_path), ROOMY)
    read(other, roomy)
    theirs = units(tmp_path)
    assert len(theirs) == 3
    (of_other,) = {unit.parents[1] for unit in theirs}
    begun = time.time() - 2 * SILENT_S
    for age, unit in enumerate(theirs[::-1]):
        os.utime(unit, (begun + age, begun + age))
    used = sum(p.stat().st_size for p in of_other.rglob("*-*"))
    full = ShardCache(str(tmp_path), used + 2**10)
    forget()
    read(store, full)
    assert units(tmp_path) == theirs, "a store that was read a moment ago lost units"
    os.utime(of_other, (begun, begun))
    forget()
    monkeypatch.setattr(cached, "_AT_A_TIME", 2**40)
    read_rows(store.uri, shard_of(store), ALL[:10], COLUMNS, cache=full)
    left = [unit for unit in theirs if unit.exists()]
    assert left
    assert left == theirs[: len(left)], "another than the oldest was removed"
    mine = set(units(tmp_path)) - set(theirs)
    assert len(mine) == 1
    assert sum(p.stat().st_size for p in tmp_path.rglob("*-*")) <= full.limit_bytes


@pytest.mark.parametrize("harm", ["truncated", "longer", "vanished", "broken", "no footer"])
def test_a_unit_that_is_not_whole_is_fetched_anew(store, tmp_path, harm) -> None:
    cache = ShardCache(str(tmp_path), ROOMY)
    expected = read(store, cache)
    if harm == "no footer":
        (hurt,) = tmp_path.rglob("tail-*")
    else:
        hurt = units(tmp_path)[1]
    content = hurt.read_bytes()
    if harm == "truncated":
        hurt.write_bytes(content[:-1])
    elif harm == "longer":
        hurt.write_bytes(content + b"x")
    elif harm == "vanished":
        hurt.unlink()
    else:
        hurt.write_bytes(bytes(len(content)))
    forget()
    assert read(store, cache).equals(expected)
    assert asked_of_shards()
    read(store, cache)
    asked_of_shards()
    assert read(store, cache).equals(expected)
    assert not asked_of_shards()
    assert hurt.read_bytes() == content


def test_a_shard_that_is_broken_in_storage_is_told_and_not_kept(store, tmp_path) -> None:
    cache, shard = ShardCache(str(tmp_path), ROOMY), shard_of(store)
    content = store.location.read_bytes(shard)
    store.location.write_bytes(shard, content[: len(content) // 2])
    for _ in range(2):
        with pytest.raises(DamagedShard, match=shard):
            read(store, cache)
    store.location.write_bytes(shard, content)
    assert read(store, cache).equals(read(store, None))


def test_storage_that_refuses_is_told_and_loses_nothing_that_is_kept(
    store, tmp_path, monkeypatch
) -> None:
    cache = ShardCache(str(tmp_path), ROOMY)
    read_rows(store.uri, shard_of(store), ALL[:10], COLUMNS, cache=cache)
    kept = units(tmp_path)
    monkeypatch.setattr(Unsteady, "refused", shard_of(store))
    with pytest.raises(StoreError, match="the storage does not give it"):
        read(store, cache)
    assert units(tmp_path) == kept
    unfinished = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix]
    assert not unfinished
    read_rows(store.uri, shard_of(store), ALL[:10], COLUMNS, cache=cache)


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A disk at a folder. Args: options: of tmpfs."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def may_mount() -> bool:
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return os.geteuid() == 0 and tried.returncode == 0


mounts = pytest.mark.skipif(not may_mount(), reason="mounting a disk needs root")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == cached.__name__]


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the folder is asked again."""
    wait_s = cached._FAILED_FOR_S
    clock = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + wait_s)
    monkeypatch.setattr(cached, "time", clock)


@mounts
def test_a_disk_is_not_filled_whatever_the_limit(store, tmp_path, caplog) -> None:
    folder, whole = tmp_path / "disk", 4 * 2**20
    others = whole - 2 * 2**20
    with disk(folder, f"size={whole}"), caplog.at_level(logging.WARNING):
        (folder / "of-others").write_bytes(bytes(others))
        cache = ShardCache(str(folder), ROOMY)
        expected = [read(store, cache, number) for number in range(N_SHARDS)]
        kept = sum(unit.stat().st_size for unit in units(folder))
        assert kept > 2**20
        asked_of_shards()
        for number in range(N_SHARDS):
            assert read(store, cache, number).equals(expected[number])
        assert asked_of_shards(), "the disk held all: nothing was tested"
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        assert free >= whole / 10
        told = cache.check()
        assert f"scale.shard_cache = {folder}" in told
        assert "scale.shard_cache_gib is 1;" in told
        roomy = ShardCache(str(folder), kept)
        assert roomy.check() == ""
    assert warnings(caplog) == []


@mounts
def test_a_full_disk_is_told_once_and_ends_nothing(store, tmp_path, caplog) -> None:
    """Full of files, which no look at free bytes foresees."""
    expected = read(store, None), read(store, None, 1)
    with disk(tmp_path / "disk", "nr_inodes=9"), caplog.at_level(logging.WARNING):
        cache = ShardCache(str(tmp_path / "disk"), ROOMY)
        for _ in range(2):
            assert read(store, cache).equals(expected[0])
            assert read(store, cache, 1).equals(expected[1])
        (told,) = warnings(caplog)
        assert "No space left on device" in told
        assert str(tmp_path / "disk") in told
        asked_of_shards()
        forget()
        assert read(store, cache).equals(expected[0])
        assert len(asked_of_shards()) < 5, "what fitted is not used"


READS = """
import sys
import numpy as np
from pipeline.store.cached import ShardCache
from pipeline.store.shards import read_rows
uri, folder, limit, rows, *shards = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for shard in shards:
    cache = ShardCache(folder, int(limit))
    read_rows(uri, shard, np.arange(int(rows)), ["frames", "fbank"], cache=cache)
"""


def test_processes_that_read_the_same_keep_each_unit_once_and_count_it_once(
    store, tmp_path, monkeypatch
) -> None:
    names = [shard_of(store, number) for number in range(N_SHARDS)]
    words = [store.uri, str(tmp_path), str(ROOMY), str(SHARD_ROWS), *names]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    monkeypatch.setattr(Unsteady, "delay_s", 0.1)  # Long enough for both to fetch the same.
    both = [
        subprocess.Popen(
            [sys.executable, "-c", READS, *words],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=120)
        assert process.returncode == 0
    kept = [p for p in tmp_path.rglob("*-*") if p.is_file()]
    assert len(kept) == N_SHARDS * (3 + 1)
    (counter,) = tmp_path.rglob("used")
    assert int(counter.read_text()) == sum(p.stat().st_size for p in kept)
    asked_of_shards()
    for number in range(N_SHARDS):
        read(store, ShardCache(str(tmp_path), ROOMY), number)
    assert not asked_of_shards()


def test_what_a_killed_writer_left_counts_and_goes_later(store, tmp_path) -> None:
    cache = ShardCache(str(tmp_path), ROOMY)
    read(store, cache)
    one = units(tmp_path)[0]
    left = one.with_name(f"0-{ROOMY}.0123abcd")
    left.touch()
    (counter,) = tmp_path.rglob("used")
    counter.unlink()
    forget()
    read(store, cache, 1)
    assert len(units(tmp_path)) == 3, "the unfinished unit was not counted"
    os.utime(left, (1.0, 1.0))
    forget()
    read(store, cache, 1)
    assert len(units(tmp_path)) == 6
    assert not left.exists()


@mounts
def test_a_disk_that_was_full_for_a_while_is_used_again(
    store, tmp_path, caplog, monkeypatch
) -> None:
    folder = tmp_path / "disk"
    with disk(folder, "nr_inodes=9"), caplog.at_level(logging.WARNING):
        cache = ShardCache(str(folder), ROOMY)
        expected = [read(store, cache, number) for number in range(N_SHARDS)]
        n_first = len(units(folder))
        assert n_first < 3 * N_SHARDS
        subprocess.run(["mount", "-o", "remount,nr_inodes=999", folder], check=True)
        later(monkeypatch)
        assert [read(store, cache, number) for number in range(N_SHARDS)] == expected
        assert len(units(folder)) == 3 * N_SHARDS
    assert len(warnings(caplog)) == 1


@mounts
def test_a_disk_that_can_only_be_read_serves_what_it_has(store, tmp_path, caplog) -> None:
    folder = tmp_path / "disk"
    with disk(folder, "size=64m"), caplog.at_level(logging.WARNING):
        cache = ShardCache(str(folder), ROOMY)
        expected = read(store, cache), read(store, None, 1)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        forget()
        assert read(store, cache).equals(expected[0])
        assert asked_of_shards() == []
        assert read(store, cache, 1).equals(expected[1])
        with pytest.raises(StoreError, match="Read-only file system"):
            cache.check()
    (told,) = warnings(caplog)
    assert "Read-only file system" in told


def unusable(folder: Path, harm: str) -> ShardCache:
    mine = folder / f"shards-{os.geteuid()}"
    if harm == "below a file":
        folder.touch()
    elif harm == "planted":
        mine.mkdir(parents=True)
        mine.chmod(0o777)
    else:
        folder.mkdir()
        (folder.parent / "elsewhere").mkdir(mode=0o777)
        mine.symlink_to(folder.parent / "elsewhere")
    return ShardCache(str(folder), ROOMY)


HARMS = ["below a file", "planted", "a link"]


@pytest.mark.parametrize("harm", HARMS)
def test_a_folder_that_cannot_be_used_or_trusted_is_refused_at_the_start(tmp_path, harm) -> None:
    cache = unusable(tmp_path / "cache", harm)
    said = f"scale.shard_cache = {cache.folder}: node .*; name a folder"
    with pytest.raises(StoreError, match=said):
        cache.check()


@pytest.mark.parametrize("harm", HARMS)
def test_a_reader_goes_without_such_a_folder_and_says_so_once(
    store, tmp_path, harm, caplog, monkeypatch
) -> None:
    cache = unusable(tmp_path / "cache", harm)
    before = sorted(tmp_path.rglob("*"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert read(store, cache).equals(read(store, None))
        later(monkeypatch)
        assert read(store, cache).equals(read(store, None))
    (told,) = warnings(caplog)
    assert f"scale.shard_cache = {cache.folder}" in told
    assert socket.gethostname() in told
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_could_not_be_made_is_used_once_it_can(store, tmp_path, monkeypatch) -> None:
    cache = unusable(tmp_path / "cache", "below a file")
    read(store, cache)
    (tmp_path / "cache").unlink()
    read(store, cache)
    assert not (tmp_path / "cache").exists()
    later(monkeypatch)
    read(store, cache)
    assert len(units(tmp_path)) == 3


def test_nobody_else_may_write_into_the_folder(store, tmp_path) -> None:
    tmp_path.chmod(0o777)
    read(store, ShardCache(str(tmp_path), ROOMY))
    (mine,) = tmp_path.iterdir()
    assert mine.stat().st_mode & 0o777 == 0o700
