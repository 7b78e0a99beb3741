"""Sources and stores on a real S3 API on 127.0.0.1, also one that fails now and then."""

import http.server
import io
import re
import tarfile
import threading
import zlib
from pathlib import Path

import boto3
import pyarrow.compute as pc
import pytest
from s3fs import S3FileSystem
from support.s3 import s3_server
from support.unsteady import Unsteady

from diccae.cli import main
from pipeline.config import FeatureSpec, IngestConfig
from pipeline.decode.payload import fbanks_function
from pipeline.errors import StoreError, StoreLocked
from pipeline.ingest.run import ingest, plan_ingest
from pipeline.ingest.shard_decoder import ShardDecoder
from pipeline.ingest.verify import verify
from pipeline.quality.rules import RULES
from pipeline.quality.run import check_quality
from pipeline.source.listing import list_sources
from pipeline.storage import Location
from pipeline.store.identity import store_id
from pipeline.store.lease import Lease
from pipeline.store.maintenance import compact, failures, vacuum
from pipeline.store.maintenance import status as store_status
from pipeline.store.store import FeatureStore, read_rows
from pipeline.synth import write_clips

SPEC = FeatureSpec(n_frames=2, frame_size=32, duration_s=1.0, fbank_frames=100)
CONFIG = IngestConfig(shard_clips=5, prefetch=3)
N_MORE = 10
"""Files added, by which requests must not grow."""


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A bucket with 12 clips below videos/; yields the folder of the local originals."""
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unsteady)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with s3_server() as Unsteady.behind, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        folder = tmp_path_factory.mktemp("s3") / "clips"
        write_clips(folder, 10, 2, seed=1, size=32)
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        for path in (folder / "videos").iterdir():
            client.upload_file(str(path), "data", f"videos/{path.name}")
        client.upload_file(str(folder / "clips.csv"), "data", "clips.csv")
        yield client, folder
        proxy.shutdown()


def run(store_uri: str) -> FeatureStore:
    """An ingest from s3:// to s3://, of so few clips that Ray is not started."""
    return ingested("s3://data", store_uri)


def ingested(source: str, store_uri: str) -> FeatureStore:
    ingest(
        f"{source}/clips.csv", f"{source}/videos", store_uri, SPEC, CONFIG,
        start_ray=no_ray, on_progress=lambda progress: None,
    )  # fmt: skip
    return FeatureStore.open(store_uri)


@pytest.fixture
def copied(s3):
    """Makes stores that hold what the first one does; an ingest of each would decode again."""
    client, _ = s3
    if not Location("s3://data/store").exists("store.json"):
        run("s3://data/store")

    def copy(name: str) -> FeatureStore:
        for entry in client.list_objects_v2(Bucket="data", Prefix="store/")["Contents"]:
            key = entry["Key"]
            source = {"Bucket": "data", "Key": key}
            client.copy_object(Bucket="data", Key=f"{name}/{key[6:]}", CopySource=source)
        return FeatureStore.open(f"s3://data/{name}")

    return copy


def no_ray() -> None:
    raise AssertionError("Ray for twelve clips")


def test_a_misspelt_bucket_is_told_and_not_made(s3, capsys):
    client, _ = s3
    source = ["--clips", "s3://data/clips.csv", "--videos", "s3://data/videos"]
    assert main(["ingest", *source, "--store", "s3://dta/store"]) == 1
    printed = capsys.readouterr().err
    assert "bucket does not exist" in printed
    assert printed.count("\n") == 1
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == ["data"]


def test_s3_to_s3_equals_local_files(s3):
    client, folder = s3
    uri = "s3://data/store"
    store = run(uri)
    rows = store.snapshot().rows(None)
    assert len(rows) == 12
    local = str(folder.parent / "local-store")
    here = ingested(str(folder), local)

    def payloads(store: FeatureStore) -> list:
        found = []
        rows = store.snapshot().rows(None)
        for shard in pc.unique(rows["shard"]).to_pylist():
            table = read_rows(store.uri, shard, None, ["clip_id", "frames", "fbank"])
            found += [tuple(row.values()) for row in table.to_pylist()]
        return sorted(found, key=lambda row: row[0])

    assert payloads(store) == payloads(here)
    assert verify(uri, sample=12)["problems"] == []
    about = store_status(uri)
    listed = client.list_objects_v2(Bucket="data", Prefix="store/features/")["Contents"]
    assert about["bytes"] == sum(entry["Size"] for entry in listed)


def test_a_bucket_without_a_list_is_every_clip_in_it(s3):
    _, folder = s3
    there = list_sources(None, "s3://data/videos", label_from_folder=True).clips
    assert sorted(there["clip_id"].to_pylist()) == sorted(
        path.stem for path in (folder / "videos").iterdir()
    )
    assert set(there["uri"].to_pylist()) == {
        f"s3://data/videos/{path.name}" for path in (folder / "videos").iterdir()
    }
    place = Location("s3://data/videos")
    place.write_bytes("list.csv", f"uri\n{min(there['uri'].to_pylist())}\n".encode())
    listed = list_sources("s3://data/videos/list.csv", None).clips.to_pylist()
    assert [row["clip_id"] for row in listed] == [min(there["clip_id"].to_pylist())]
    name = min(there["uri"].to_pylist()).rpartition("/")[2]
    place.write_bytes("list.csv", f"uri\n{name}\n".encode())
    (found,) = list_sources("s3://data/videos/list.csv", None).clips.to_pylist()
    assert found["uri"] == f"s3://data/videos/{name}"
    place.remove("list.csv")
    whole = list_sources(None, "s3://data", label_from_folder=True).clips
    assert set(whole["label"].to_pylist()) == {"videos"}


def test_replaced_object_is_redone_and_nothing_else(s3, copied):
    client, folder = s3
    uri = copied("store2").uri
    first, second, *_ = sorted((folder / "videos").iterdir())
    client.upload_file(str(second), "data", f"videos/{first.name}")
    plan = plan_ingest("s3://data/clips.csv", "s3://data/videos", uri, None, CONFIG)
    assert plan.todo["clip_id"].to_pylist() == [first.stem]
    assert plan.counts["changed"] == 1
    client.upload_file(str(first), "data", f"videos/{first.name}")
    again = plan_ingest("s3://data/clips.csv", "s3://data/videos", uri, None, CONFIG)
    assert again.is_empty  # The etag speaks of the content, not of the time.


def test_store_that_fails_now_and_then_and_is_slow_loses_nothing(s3, monkeypatch):
    in_turn = property(lambda proxy: (500, 503)[proxy.n_failed % 2])
    for name, value in {"fail_every": 7, "n_failed": 0, "status": in_turn, "delay_s": 0.02}.items():
        monkeypatch.setattr(Unsteady, name, value)
    store = run("s3://data/store-unsteady")
    monkeypatch.setattr(Unsteady, "fail_every", 0)
    assert Unsteady.n_failed > 3
    assert len(store.snapshot().rows(None)) == 12
    assert verify(store.uri, sample=3)["problems"] == []


@pytest.mark.slow
def test_object_that_may_not_be_read_is_quarantined_alone(s3, monkeypatch):
    _, folder = s3
    first = min(path.name for path in (folder / "videos").iterdir())
    monkeypatch.setattr(Unsteady, "refused", first)
    run("s3://data/store-refused")
    assert store_status("s3://data/store-refused")["ok"] == 11
    told = failures("s3://data/store-refused", examples=3)["open_failed"]
    assert [example["clip_id"] for example in told["examples"]] == [first.removesuffix(".mp4")]
    assert re.search("AccessDenied|Forbidden", told["examples"][0]["detail"])


def odd(client, folder: Path, name: str) -> dict[str, str]:
    """An ingest of a folder of the bucket with a plain clip, one of this name, and a part of it.
    Returns the reasons of all clips ("": ok)."""
    first, second, *_ = sorted((folder / "videos").iterdir())
    place = f"odd-{zlib.crc32(name.encode())}"
    client.upload_file(str(first), "data", f"{place}/plain.mp4")
    client.upload_file(str(second), "data", f"{place}/{name}.mp4")
    with io.BytesIO() as part:
        with tarfile.open(fileobj=part, mode="w") as tar:
            tar.add(first, "member.mp4")
        client.put_object(Bucket="data", Key=f"{place}/{name}.tar", Body=part.getvalue())
    store = f"s3://data/store-{place}"
    config = CONFIG.model_copy(update={"max_failed_frac": 1.0})
    ingest(
        None, f"s3://data/{place}", store, SPEC, config,
        start_ray=no_ray, on_progress=lambda progress: None,
    )  # fmt: skip
    states = FeatureStore.open(store).snapshot().states(["clip_id", "reason"])
    return {row["clip_id"]: row["reason"] or "" for row in states.to_pylist()}


@pytest.mark.slow
def test_two_colons_in_a_key_are_part_of_it(s3):
    name = "C++::lesson"
    assert odd(*s3, name) == {"plain": "", name: "", f"{name}__member": ""}


@pytest.mark.slow
def test_an_object_whose_name_a_library_chokes_on_is_quarantined_alone(s3, monkeypatch):
    get_file = S3FileSystem._get_file

    async def choking(self, path, *args, **options):
        if path.endswith("choke.mp4"):
            raise TypeError("unexpected keyword argument")
        return await get_file(self, path, *args, **options)

    monkeypatch.setattr(S3FileSystem, "_get_file", choking)
    assert odd(*s3, "choke") == {"plain": "", "choke": "open_failed", "choke__member": ""}


def test_keys_that_open_nothing_any_more_end_the_shard_and_quarantine_nothing(s3, monkeypatch):
    store = FeatureStore.create("s3://data/store-expired", SPEC)
    plan = plan_ingest("s3://data/clips.csv", "s3://data/videos", store.uri, SPEC, CONFIG)
    known = store_id(store.location)
    decoder = ShardDecoder(store.uri, SPEC, CONFIG, "r", fbanks_function(SPEC), expected_id=known)
    shards = filter(len, decoder.decode(0, plan.todo))
    assert next(shards)["status"].to_pylist() == ["ok"] * CONFIG.shard_clips
    monkeypatch.setattr(Unsteady, "refused", "/videos/")
    with pytest.raises(PermissionError):
        list(shards)


def test_lease_on_s3_lets_one_writer_in(s3):
    location = FeatureStore.create("s3://data/store4", SPEC).location
    with Lease(location, 30.0, "the first"):
        with pytest.raises(StoreLocked, match="the first"), Lease(location, 30.0, "the second"):
            pass
        assert not location.create_bytes("lease/00000001.json", b"{}")
    with Lease(location, 30.0, "the third"):
        pass


@pytest.mark.slow
def test_pinned_version_on_s3_survives_compact_and_vacuum(copied):
    store = copied("store5")
    old = store.snapshot()
    digest = old.digest
    store.pin(old.version, "run-1")
    compact(store.uri)
    vacuum(store.uri, retention_hours=0.0)
    assert store.pins() == {"run-1": old.version}
    assert store.snapshot(old.version).digest == digest == store.snapshot().digest


@pytest.mark.slow
def test_keys_that_may_not_read_shards_make_verify_forget_nothing(copied, monkeypatch):
    store = copied("store8")
    before = store.snapshot()
    monkeypatch.setattr(Unsteady, "refused", "/features/")
    with pytest.raises(StoreError, match="Nothing is known to be wrong"):
        verify(store.uri, sample=0, repair=True)
    monkeypatch.setattr(Unsteady, "refused", "")
    assert store.snapshot().digest == before.digest
    assert store.version() == before.version


@pytest.mark.slow
def test_requests_grow_with_listing_pages_not_with_files(s3, copied, monkeypatch):
    client, _ = s3
    store = copied("store7")
    runs = {
        "status": lambda: store_status(store.uri),
        "plan": lambda: plan_ingest(
            "s3://data/clips.csv", "s3://data/videos", store.uri, None, CONFIG
        ),
        "vacuum": lambda: vacuum(store.uri, retention_hours=0.0),
    }

    def counted() -> dict[str, int]:
        n_requests = {}
        for name, work in runs.items():
            work()  # Connections, regions and the first vacuum's own work.
            monkeypatch.setattr(Unsteady, "n_requests", 0)
            work()
            n_requests[name] = Unsteady.n_requests
        return n_requests

    before = counted()
    for i in range(N_MORE):
        client.put_object(Bucket="data", Key=f"store7/features/part-x-{i:06d}-0.parquet", Body=b"x")
        client.put_object(Bucket="data", Key=f"videos/more-{i}.mp4", Body=b"x")
    monkeypatch.setattr(Unsteady, "n_requests", 0)
    assert vacuum(store.uri, retention_hours=0.0)["shards"] == N_MORE
    n_to_delete = Unsteady.n_requests
    for i in range(N_MORE):
        client.put_object(Bucket="data", Key=f"store7/features/part-x-{i:06d}-0.parquet", Body=b"x")
    after = counted()
    for i in range(N_MORE):
        client.delete_object(Bucket="data", Key=f"videos/more-{i}.mp4")
    assert after["status"] <= before["status"] + 1
    assert after["plan"] <= before["plan"] + 1
    assert n_to_delete <= before["vacuum"] + 3


@pytest.mark.slow
def test_temporary_downloads_are_gone(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run("s3://data/store6")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


@pytest.mark.slow
def test_an_object_replaced_by_one_of_its_size_is_no_longer_left_out(copied, s3, monkeypatch):
    """Objects have no time of modification: only the etag tells them apart."""
    client, folder = s3
    store = copied("judged")
    first = RULES[0]
    everything = first._replace(threshold=float("inf"))
    monkeypatch.setattr("pipeline.quality.run.RULES", (everything, *RULES[1:]))
    check_quality(store.uri, reads_sources=False)
    key = f"videos/{sorted((folder / 'videos').iterdir())[0].name}"
    content = client.get_object(Bucket="data", Key=key)["Body"].read()
    try:
        client.put_object(Bucket="data", Key=key, Body=content[:-1] + bytes([content[-1] ^ 1]))
        config = CONFIG.model_copy(update={"leave_out": (first.name,), "max_removed_frac": 1.0})
        plan = plan_ingest("s3://data/clips.csv", "s3://data/videos", store.uri, None, config)
    finally:
        client.put_object(Bucket="data", Key=key, Body=content)
    assert (plan.counts["changed"], plan.counts["removed"]) == (1, 11)
