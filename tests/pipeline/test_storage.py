"""A folder of this machine and a bucket are one kind of place, also a bucket that errs."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.unsteady import Unsteady, unsteady_bucket

import pipeline.storage
from pipeline import patience
from pipeline.config import FeatureSpec
from pipeline.storage import Location, place_of
from pipeline.store.store import FeatureStore


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with unsteady_bucket("places") as uri:
        yield uri


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return Location(tmp_path / "run")
    return Location(f"{request.getfixturevalue('bucket')}/{tmp_path.name}/run")


def test_what_is_written_is_there_under_its_name_and_nothing_else(place: Location) -> None:
    with place.written("a/model.bin") as path:
        path.write_bytes(b"0123456789")
        assert not place.exists("a/model.bin")
    with pytest.raises(FileNotFoundError), place.written("a/broken.bin") as path:
        (path / "half").write_bytes(b"1")
    place.write_bytes("run.json", b"{}")
    assert place.entries() == ["a", "run.json"]
    assert place.entries("a") == ["model.bin"]
    assert place.tail("a/model.bin", 4) == b"6789"
    assert place.tail("a/model.bin", 99) == b"0123456789"
    with place.fetched("a/model.bin") as path, place.open("a/model.bin") as file:
        assert path.read_bytes() == file.read() == b"0123456789"
    with place.fetched("a") as folder:
        assert [path.name for path in folder.iterdir()] == ["model.bin"]
    assert place_of(place.uri_of("a", "model.bin"))[0].uri == place.below("a").uri


def test_what_is_not_there_is_none_or_an_error(place: Location) -> None:
    assert place.entries() == place.entries("gone") == []
    assert not place.exists("gone")
    place.remove_tree("gone")
    for look in (place.fetched, place.open):
        with pytest.raises(FileNotFoundError), look("gone"):
            pass
    with pytest.raises(FileNotFoundError):
        place.tail("gone", 4)


def test_a_folder_is_removed_whole(place: Location) -> None:
    for name in ("keep/x", "drop/x", "drop/deep/y"):
        place.write_bytes(name, b"1")
    place.remove_tree("drop")
    assert place.entries() == ["keep"]


def test_what_a_killed_writer_left_is_none_of_the_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Location(tmp_path)
    place.write_bytes("kept.tmp", b"1")
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        place.write_bytes("state.json", b"{}")
    assert len(place.files()) == 2, "nothing was left"
    assert place.entries() == ["kept.tmp"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nobody answers", "503"])
def test_requests_that_fail_seven_times_are_made_an_eighth_time_and_said(
    bucket: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """botocore alone gives a server's error up after five; s3fs repeats a cut answer silently."""
    place = Location(f"{bucket}/errs")
    place.write_bytes("file", b"before")
    monkeypatch.setattr(patience, "_told_at", -patience._TOLD_EVERY_S)
    if kind == "503":
        Unsteady.lose = 7
    else:
        Unsteady.drop = 7
    place.write_bytes("file", b"after")
    assert Unsteady.lose == Unsteady.drop == 0
    told = [line.message for line in caplog.records if line.name == patience.__name__]
    assert [line.partition(":")[0] for line in told] == ["waiting for storage"]
    assert place.read_bytes("file") == b"after"


def test_a_file_that_was_created_counts_although_the_answer_was_lost(bucket: str) -> None:
    place = Location(f"{bucket}/lost")
    Unsteady.lose = 1
    assert place.create_bytes("lease/1.json", b"mine")
    assert not place.create_bytes("lease/1.json", b"another's")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["store", "status", "--store", "s3://b/x"], "Could not connect to the endpoint URL"),
        (["cluster", "--vectors", "s3://b/x", "--k", "2", "--out", "x"], "Could not connect to"),
        (["store", "status", "--store", "gs://b/x"], "Cannot connect to host 127.0.0.1:9"),
        (["cluster", "--vectors", "gs://b/x", "--k", "2", "--out", "x"], "Cannot connect to host"),
    ],
)
def test_a_wrong_endpoint_is_told_while_it_is_tried_again(
    command: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    # Else a gRPC endpoint is asked first for the kind of the bucket.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    command = [sys.executable, "-m", "diccae", *command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    given_up = threading.Timer(60, process.kill)
    given_up.start()
    try:
        line = process.stderr.readline()
        assert process.poll() is None, "said when it had given up"
    finally:
        given_up.cancel()
        process.kill()
        process.communicate()
    assert line.startswith(f"waiting for storage: {why}")


def test_a_table_in_a_bucket_that_is_away_is_told_while_it_is_tried_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Delta library repeats its requests without a word."""
    store = FeatureStore.create(f"{bucket}/store", FeatureSpec())
    monkeypatch.setattr(patience, "_told_at", -patience._TOLD_EVERY_S)
    monkeypatch.setattr(pipeline.storage, "_SLOW_S", 0.2)
    told = threading.Event()
    monkeypatch.setattr(patience._log, "warning", lambda *_: told.set())
    Unsteady.fail_every = 1
    with ThreadPoolExecutor(1) as reader:
        version = reader.submit(lambda: store.snapshot().version)
        try:
            assert told.wait(20), "half a minute of silence"
            assert not version.done()
        finally:
            Unsteady.fail_every = 0
        assert version.result() == 0
