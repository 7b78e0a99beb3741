"""Whatever dies in a run through Ray, the finished store equals an undisturbed one, by row."""

import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.exceptions
import psutil
import pytest
from support.disks import small_disk
from support.polling import wait_until
from support.processes import kill, ray_env
from support.stores import contents

from pipeline.config import FeatureSpec
from pipeline.errors import PipelineError, StoreLocked
from pipeline.storage import Location
from pipeline.store.lease import Lease
from pipeline.store.maintenance import status
from pipeline.store.store import FeatureStore

DRIVER = """
import os
import sys
from pipeline.config import FeatureSpec, IngestConfig
from pipeline.ingest.run import ingest

def start_ray():
    import ray
    quiet = {"log_to_driver": False, "configure_logging": False}
    if "RAY_ADDRESS" in os.environ:
        ray.init(address="auto", **quiet)
        return
    ray.init(address="local", num_cpus=4, include_dashboard=False,
             object_store_memory=100 * 2**20, _temp_dir=sys.argv[6], **quiet)

def on_progress(progress):
    print(progress.done, flush=True)

if __name__ == "__main__":
    spec = FeatureSpec.model_validate_json(sys.argv[4])
    config = IngestConfig.model_validate_json(sys.argv[5])
    ingest(*sys.argv[1:4], spec, config, start_ray=start_ray, on_progress=on_progress)
"""


@pytest.fixture
def source(source, ray_session):
    """The copied source, whose clips are all Ray's."""
    source.config = source.config.model_copy(update={"local_clips": 0})
    return source


HERE = {"local_clips": 1000}
"""The next run, which finds what a fault has left, needs no Ray for that."""


class Driver:
    """An ingest in a process of its own, with a Ray of its own unless `env` says which to join."""

    def __init__(self, source, folder: Path, env=os.environ) -> None:
        folder.mkdir()
        script = folder / "driver.py"
        script.write_text(DRIVER)
        config = source.config.model_copy(update={"shard_clips": 4, "commit_shards": 1})
        arguments = [
            source.csv, source.videos, source.store,
            source.spec.model_dump_json(), config.model_dump_json(), folder,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**env, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def wait_for_shard(self) -> None:
        """Until something was decoded."""
        line = self.process.stdout.readline()
        assert line.strip().isdigit(), self.process.stderr.read()[-3000:]

    def kill(self) -> None:
        """SIGKILL the driver only; its Ray notices and goes."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def ray_folder():
    """Short: Ray's socket paths are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pf", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_driver_killed_then_run_again_loses_and_doubles_nothing(source, undisturbed, ray_folder):
    source.store += "-again"
    first = Driver(source, ray_folder / "a", ray_env())
    first.wait_for_shard()
    first.kill()
    n_kept = status(source.store)["ok"]
    second = source.ingest(**HERE)
    assert second.new == second.ok == 48 - n_kept
    assert contents(source.store) == undisturbed


@pytest.mark.slow
def test_actor_decode_child_and_fbank_service_killed_cost_nothing_but_time(source, undisturbed):
    """The child's clip may be told as worker_died; the next run heals it."""
    source.store += "-again"
    names = ["pipeline.decode.fbank_service", "pipeline.decode.sandbox", "ray::MapWorker"]
    killed = []

    def kill_one(progress):
        if len(killed) < 3 and kill(names[len(killed)], at_most=1):
            killed.append(names[len(killed)])

    summary = source.ingest(
        source.spec, kill_one, shard_clips=4, commit_shards=1, max_failed_frac=1.0
    )
    assert killed == names
    assert summary.ok + summary.failed == 48
    if summary.failed:
        assert source.ingest(**HERE).ok == summary.failed
    assert contents(source.store) == undisturbed


@pytest.mark.soak
def test_driver_killed_at_ten_random_moments(source, undisturbed, ray_folder):
    source.store += "-again"
    for i in range(10):
        run = Driver(source, ray_folder / f"{i}")
        try:
            run.process.wait(timeout=random.Random(i).uniform(0.5, 12))
        except subprocess.TimeoutExpired:
            run.kill()
    source.ingest(source.spec)
    assert contents(source.store) == undisturbed


@pytest.mark.slow
def test_a_hang_a_crash_and_a_leak_cost_a_clip_each_and_are_healed_by_the_next_run(
    source, undisturbed
):
    source.store += "-again"
    summary = source.ingest(
        source.spec, extractor="tests.pipeline.poison:extract", timeout_s=6.0, child_memory_mb=400
    )
    assert (summary.ok, summary.failed) == (45, 3)
    assert status(source.store)["by_reason"] == {"worker_died": 2, "timeout": 1}
    again = source.ingest(**HERE)
    assert (again.retried, again.ok, again.unchanged) == (3, 3, 45)
    assert contents(source.store) == undisturbed


@pytest.fixture
def full_soon(tmp_path):
    """A file system of 1.5 MB."""
    with small_disk(tmp_path / "disk", "1500k") as folder:
        yield folder


@pytest.mark.slow
def test_disk_full_says_so_keeps_what_is_done_and_goes_on_later(source, undisturbed, full_soon):
    elsewhere = f"{source.store}-moved"
    source.store = str(full_soon / "store")
    with pytest.raises(PipelineError, match=r"No space left on device(.|\n)*run the same again"):
        source.ingest(source.spec, shard_clips=4, commit_shards=1)
    n_kept = status(source.store)["ok"]
    assert 0 < n_kept < 48
    shutil.move(source.store, elsewhere)
    source.store = elsewhere
    Path(elsewhere, "features", ".part-killed.tmp").write_bytes(b"what a dead writer left")
    assert source.ingest(**HERE).ok == 48 - n_kept
    assert not list(Path(elsewhere, "features").glob(".part*"))
    assert contents(source.store) == undisturbed


class Mend(logging.Handler):
    """Calls a function at the first log record."""

    def __init__(self, mend) -> None:
        super().__init__()
        self.mend, self.records = mend, []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record.getMessage())
        if len(self.records) == 1:
            self.mend()


@pytest.mark.slow
def test_storage_that_is_away_for_a_while_costs_a_second_try(source, undisturbed):
    source.store += "-again"
    features = Path(source.store, "features")
    away = features.with_name("away")

    def unmount(progress):
        if not away.exists() and not handler.records:
            features.rename(away)
            features.touch()

    def mount():
        features.unlink()
        away.rename(features)

    handler = Mend(mount)
    logging.getLogger("pipeline.ingest.waves").addHandler(handler)
    try:
        summary = source.ingest(source.spec, unmount, shard_clips=4, commit_shards=1)
    finally:
        logging.getLogger("pipeline.ingest.waves").removeHandler(handler)
    # Whether a file is opened or its folder made first: both meet a file instead of the folder.
    assert re.search("NotADirectoryError|FileExistsError", handler.records[0])
    assert (summary.ok, summary.failed) == (48, 0)
    assert contents(source.store) == undisturbed


def test_second_writer_is_refused_while_the_first_lives(tmp_path):
    location = FeatureStore.create(str(tmp_path / "s"), FeatureSpec()).location
    with Lease(location, 30.0, "the first"):
        with (
            pytest.raises(StoreLocked, match="locked by the first") as caught,
            Lease(location, 30.0, "the second"),
        ):
            pass
        assert caught.value.exit_code == 4
    with Lease(location, 30.0, "the third"):
        pass


def hold(location, **changes) -> None:
    """A lease as another holder would have left it."""
    lease = Lease(location, 30.0, "a run elsewhere")
    lease._me |= changes
    lease._generation = 1
    location.create_bytes("lease/00000001.json", lease._stamp())


def test_dead_holder_on_this_machine_is_taken_over_at_once(tmp_path):
    gone = subprocess.Popen(["true"])
    started = psutil.Process(gone.pid).create_time()
    gone.wait()
    location = Location(str(tmp_path))
    hold(location, pid=gone.pid, pid_started=started)
    began = time.monotonic()
    with Lease(location, 30.0, "me"):
        assert time.monotonic() - began < 1


def test_silent_holder_elsewhere_is_taken_over_and_notices(tmp_path):
    location = Location(str(tmp_path))
    silent = Lease(location, 3.0, "a run elsewhere")
    silent._me |= {"host": "elsewhere"}
    silent._beat = lambda: None  # type: ignore[method-assign]
    silent._thread._target = lambda: None
    silent.__enter__()
    with pytest.raises(StoreLocked), Lease(location, 3.0, "too early"):
        pass
    deadline = time.monotonic() + 60
    while True:
        try:
            with Lease(location, 3.0, "me"):
                with pytest.raises(StoreLocked, match="lost its lease"):
                    silent.check()
                break
        except StoreLocked:
            assert time.monotonic() < deadline


def test_heartbeat_goes_on_after_storage_was_away(tmp_path, monkeypatch):
    location = Location(str(tmp_path))
    write, calls = location.write_bytes, []

    def away_at_first(name: str, data: bytes) -> None:
        calls.append(name)
        if len(calls) == 1:
            raise botocore.exceptions.EndpointConnectionError(endpoint_url="http://away")
        write(name, data)

    monkeypatch.setattr(location, "write_bytes", away_at_first)
    with Lease(location, 0.3, "me"):
        wait_until(lambda: len(calls) >= 2, 60, "another heartbeat")


def test_of_many_takers_one_wins(tmp_path):
    location = Location(str(tmp_path))
    barrier = threading.Barrier(8)

    def take(i: int) -> bool:
        lease = Lease(location, 30.0, f"taker {i}")
        barrier.wait()
        try:
            lease.__enter__()
        except StoreLocked:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) == 1
