"""The clips table pins data sets; compact and vacuum lose nothing that anybody needs."""

import errno
import importlib
import io
import json
import os
import tarfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import FeatureSpec
from pipeline.errors import SourceError, StoreError
from pipeline.ingest.verify import verify
from pipeline.store.maintenance import compact, export, failures, status, vacuum
from pipeline.store.schema import CLIPS_SCHEMA, SPEC_PROPERTY
from pipeline.store.shards import ShardWriter, by_row_group, by_shard, read_rows
from pipeline.store.store import FeatureStore

SPEC = FeatureSpec(n_frames=1, frame_size=16, fbank_frames=8, n_mels=8)
WEEK_H = 168.0


def commit(store: FeatureStore, ids: list[str], shard: str | None = None, **changes) -> int:
    """One shard with these clips and its commit."""
    rows = []
    name = shard or f"features/part-run-{len(os.listdir(store.uri)):06d}-{ids[0]}.parquet"
    writer = ShardWriter(store.location, name, SPEC)
    for clip_id in ids:
        row = writer.add(
            {
                "clip_id": clip_id, "row_key": f"key-{clip_id}", "frames": [b"jpeg"],
                "frame_ts_ms": [0], "fbank": bytes(128), "fbank_frames": 8,
            }
        )  # fmt: skip
        rows.append(
            {
                "clip_id": clip_id, "status": "ok", "label": "dog", "split": "train",
                "row_key": f"key-{clip_id}", "shard": name, "row": row,
                "spec_hash": SPEC.spec_hash(), **changes,
            }
        )  # fmt: skip
    writer.publish()
    return store.append(pa.Table.from_pylist(rows, CLIPS_SCHEMA), {})


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    return FeatureStore.create(str(tmp_path / "store"), SPEC)


def live(store: FeatureStore, version: int | None = None) -> set[str]:
    return set(store.snapshot(version).rows(None)["clip_id"].to_pylist())


def test_newest_row_of_a_clip_counts_and_a_version_stays_what_it_was(store):
    first = commit(store, ["a", "b"])
    second = commit(store, ["a"], label="cat")
    third = commit(store, ["b"], status="removed")
    assert live(store, first) == {"a", "b"}
    assert store.snapshot(first).classes == ["dog"]
    assert store.snapshot(second).classes == ["cat", "dog"]
    assert live(store, third) == {"a"}
    with pytest.raises(StoreError, match="version 99"):
        store.snapshot(99)


def test_classes_and_digest_speak_of_all_labels_of_a_clip(store):
    commit(store, ["a", "b"])
    before = store.snapshot()
    commit(store, ["a"], more_labels="cat|barking, loud")
    after = store.snapshot()
    assert after.classes == ["barking, loud", "cat", "dog"]
    assert after.digest != before.digest
    commit(store, ["a"])
    assert store.snapshot().digest == before.digest


def test_digest_speaks_of_content_not_of_shards_or_order(store, tmp_path):
    commit(store, ["a", "b", "c"])
    other = FeatureStore.create(str(tmp_path / "other"), SPEC)
    commit(other, ["c"])
    commit(other, ["b", "a"])
    assert store.snapshot().digest == other.snapshot().digest
    for change in ({"label": "cat"}, {"split": "test"}, {"row_key": "other"}):
        commit(other, ["a"])
        assert store.snapshot().digest == other.snapshot().digest
        commit(other, ["a"], **change)
        assert store.snapshot().digest != other.snapshot().digest


def test_rows_of_another_spec_are_not_part_of_the_data_set_until_it_is_put_in_force(store):
    commit(store, ["a", "b"])
    newer = SPEC.model_copy(update={"jpeg_quality": 50})
    commit(store, ["a"], spec_hash=newer.spec_hash())
    assert live(store) == {"a", "b"}
    assert store.snapshot().spec == SPEC
    switched = store.put_in_force(newer, {})
    assert live(store) == {"a"}
    assert store.snapshot().spec == newer
    assert store.snapshot(switched - 1).spec == SPEC
    assert live(store, switched - 1) == {"a", "b"}
    store.put_in_force(SPEC, {})
    assert live(store) == {"a", "b"}


@pytest.mark.parametrize("gone", [{"status": "removed"}, {"status": "failed", "reason": "missing"}])
def test_a_clip_that_is_gone_is_gone_for_every_spec(store, gone):
    commit(store, ["a", "b"])
    newer = SPEC.model_copy(update={"jpeg_quality": 50})
    commit(store, ["a"], spec_hash=newer.spec_hash(), **gone)
    assert live(store) == {"b"}
    commit(store, ["a"], spec_hash=newer.spec_hash())
    assert live(store) == {"b"}, "what came back under another spec has no features of this one"
    commit(store, ["a"])
    assert live(store) == {"a", "b"}


def as_format_1(store: FeatureStore, newest_spec: FeatureSpec) -> FeatureStore:
    """The store as the version before would have left it: no spec is named."""
    commit(store, ["a", "b"])
    store.write_spec(newest_spec)
    commit(store, ["c"], spec_hash=newest_spec.spec_hash())
    for path in Path(store.uri, "clips", "_delta_log").glob("*.json"):
        path.write_text(path.read_text().replace(SPEC_PROPERTY, "another.property"))
    about = json.dumps({"format": 1, "spec_hash": SPEC.spec_hash()})
    Path(store.uri, "store.json").write_text(about)
    return FeatureStore.open(store.uri)


def test_a_store_of_format_1_opens_and_its_first_writer_names_the_spec_in_force(store):
    newer = SPEC.model_copy(update={"jpeg_quality": 50})
    old = as_format_1(store, newer)
    before = old.snapshot()
    assert (before.spec, live(old)) == (newer, {"c"})
    with old.lease(30.0, "the first"):
        pass
    after = FeatureStore.open(store.uri).snapshot()
    assert after.names_its_spec
    assert (after.version, after.spec, after.digest) == (before.version + 1, newer, before.digest)
    assert json.loads(Path(store.uri, "store.json").read_text())["format"] == 2
    assert old.snapshot(before.version).digest == before.digest
    with old.lease(30.0, "the second"):
        assert old.version() == after.version


def test_a_store_of_the_future_is_refused_by_its_number(store):
    Path(store.uri, "store.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(StoreError, match="store format 3, this version reads 1 to 2"):
        FeatureStore.open(store.uri)


def test_spec_hash_changes_with_every_field():
    seen = {FeatureSpec().spec_hash()}
    changes = {
        "n_frames": 9, "frame_size": 112, "resize": "squash", "jpeg_quality": 90,
        "sample_rate_hz": 8000, "n_mels": 64, "fbank_frames": 512, "duration_s": 5.0,
        "audio_channel": "first", "decoder": "pyav", "min_audio_s": 1.0, "min_video_s": 1.0,
        "max_clip_s": 60.0, "version": 4,
    }  # fmt: skip
    assert set(changes) == set(FeatureSpec.model_fields)
    for name, value in changes.items():
        seen.add(FeatureSpec(**{name: value}).spec_hash())
    assert len(seen) == 1 + len(changes)
    assert FeatureSpec(n_frames=10).spec_hash() == FeatureSpec().spec_hash()


def test_shards_without_a_clips_row_do_not_exist(store):
    commit(store, ["a"])
    writer = ShardWriter(store.location, "features/part-dead-000000-0.parquet", SPEC)
    writer.publish()
    assert status(store.uri)["shards"] == 1


def test_a_shard_given_up_on_a_full_disk_leaves_no_file_behind(store, monkeypatch):
    """Its bytes are what the disk is full of."""
    writer = ShardWriter(store.location, "features/part-dead-000000-0.parquet", SPEC)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.ParquetWriter.close", full)
        with pytest.raises(OSError, match="No space"):
            writer.discard()
    assert not list(Path(store.uri, "features").iterdir())


def test_rows_come_a_shard_and_a_row_group_of_it_at_a_time():
    rows = pa.concat_tables(
        pa.table({"shard": [name] * n, "row": range(n)})
        for name, n in (("b", 1), ("a", 64), ("c", 130))
    )
    assert [(shard, len(piece)) for shard, piece in by_shard(rows)] == [
        ("b", 1), ("a", 64), ("c", 130),
    ]  # fmt: skip
    assert list(by_shard(rows.slice(0, 0))) == []
    sparse = np.array([0, 63, 64, 200, 255, 256])
    assert [sparse[at].tolist() for at in by_row_group(sparse)] == [
        [0, 63], [64], [200, 255], [256],
    ]  # fmt: skip
    assert by_row_group(sparse[:0]) == []


def test_compact_keeps_every_live_row_and_the_digest(store):
    commit(store, [f"c{i}" for i in range(100)])
    for i in range(70):
        commit(store, [f"c{i}"], status="removed")
    before = store.snapshot()
    report = compact(store.uri)
    after = store.snapshot()
    assert (report["clips_moved"], report["shards_after"]) == (30, 1)
    assert after.digest == before.digest
    assert len(after.clips) == 30
    for row in after.rows(None).to_pylist():
        stored = read_rows(store.uri, row["shard"], np.array([row["row"]]), ["clip_id"])
        assert stored["clip_id"].to_pylist() == [row["clip_id"]]
    assert store.snapshot(before.version).digest == before.digest


def test_compact_of_small_shards_that_are_all_live_makes_no_version(store):
    for clip_id in "abcde":
        commit(store, [clip_id])
    before = store.version()
    report = compact(store.uri)
    assert report == {"shards_before": 5, "shards_after": 5, "clips_moved": 0, "version": before}
    assert store.version() == before
    commit(store, ["a"], label="cat")
    assert compact(store.uri)["version"] == before + 2, "a superseded row was dropped"


def test_vacuum_keeps_what_is_pinned_and_young_and_drops_the_rest(store):
    pinned = commit(store, ["a", "b"])
    pinned_digest = store.snapshot(pinned).digest
    store.pin(pinned, "run-1")
    commit(store, ["a"], shard="features/part-x-000001-0.parquet")
    current = commit(store, ["a"], shard="features/part-x-000002-0.parquet")
    files = lambda: set(os.listdir(Path(store.uri, "features")))  # noqa: E731
    assert vacuum(store.uri, retention_hours=1.0)["shards"] == 0
    dry = vacuum(store.uri, retention_hours=0.0, dry_run=True)
    assert dry["shards"] == 1
    assert len(files()) == 3
    assert vacuum(store.uri, retention_hours=0.0)["shards"] == 1
    assert "part-x-000001-0.parquet" not in files()
    assert store.snapshot(pinned).digest == pinned_digest
    assert live(store) == live(store, current) == {"a", "b"}
    store.unpin("run-1")
    assert store.pins() == {}


def _grow_old(store: FeatureStore, days: float) -> None:
    for path in Path(store.uri).rglob("*"):
        moment = path.stat().st_mtime - days * 86400
        os.utime(path, (moment, moment))


@pytest.mark.parametrize("dry_run", [True, False])
def test_vacuum_works_after_one_of_a_shorter_retention(dry_run, store, caplog):
    commit(store, ["a", "b"])
    commit(store, ["a"], shard="features/part-x-000001-0.parquet")
    _grow_old(store, days=10)
    compact(store.uri)  # The log of before is superseded, and needed for a week.
    newest = store.version()
    vacuum(store.uri, retention_hours=0.0)
    caplog.clear()
    assert vacuum(store.uri, WEEK_H, dry_run)["kept"][0] == newest
    (record,) = caplog.records
    said = f"{store.uri}: nothing is kept for 1 of the versions up to {newest - 1}, which"
    assert record.getMessage().startswith(said)
    assert live(store) == {"a", "b"}


def test_vacuum_keeps_what_a_young_version_needs_behind_one_whose_files_are_gone(store):
    commit(store, ["a"])
    gone = commit(store, ["a"])  # So that compact has something to do.
    _grow_old(store, days=10)
    compact(store.uri)
    young = store.version()
    digest = store.snapshot(young).digest
    store.pin(young, "run-1")
    commit(store, ["a"], shard="features/part-x-000001-0.parquet")
    compact(store.uri)
    vacuum(store.uri, retention_hours=0.0)
    store.unpin("run-1")
    vacuumed = vacuum(store.uri, WEEK_H)
    assert vacuumed["shards"] == 0
    assert gone not in vacuumed["kept"]
    assert young in vacuumed["kept"]
    (shard,) = store.snapshot(young).shards()
    assert Path(store.uri, shard).exists()
    assert store.snapshot(young).digest == digest


def test_vacuum_refuses_where_a_pinned_version_cannot_be_read(store):
    pinned = commit(store, ["a"])
    commit(store, ["a", "b"])
    _grow_old(store, days=10)
    compact(store.uri)
    vacuum(store.uri, retention_hours=0.0)
    store.pin(pinned, "run-1")
    for dry_run in (True, False):
        with pytest.raises(StoreError, match=f"version {pinned} cannot be read"):
            vacuum(store.uri, WEEK_H, dry_run)


def test_verify_finds_a_row_of_another_clip_and_forgets_it_on_demand(store):
    commit(store, ["a", "b"])
    commit(store, ["c"], shard="features/part-x-000009-0.parquet", row=5)
    report = verify(store.uri, sample=0)
    assert [p["clip_id"] for p in report["problems"]] == ["c"]
    assert store.snapshot().version == report["version"]
    assert verify(store.uri, sample=0, repair=True)["repaired"] == 1
    assert live(store) == {"a", "b"}


def test_failures_tell_counts_and_examples(store):
    for i in range(5):
        commit(store, [f"f{i}"], status="failed", reason="no_audio", detail="silent film")
    commit(store, ["g"], status="failed", reason="timeout")
    report = failures(store.uri, examples=2)
    assert list(report) == ["no_audio", "timeout"]
    assert report["no_audio"]["clips"] == 5
    assert [e["clip_id"] for e in report["no_audio"]["examples"]] == ["f0", "f1"]
    assert list(failures(store.uri, "timeout", examples=3)) == ["timeout"]


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_export_holds_every_clip_for_other_tools(kind, store, tmp_path):
    commit(store, ["a", "b"])
    commit(store, ["c"], split="test")
    out = tmp_path / "out"
    assert export(store.uri, str(out), kind)["clips"] == 3
    if kind == "folder":
        assert np.load(out / "train" / "a" / "fbank.npy").shape == (8, 8)
        assert json.loads((out / "test" / "c" / "clip.json").read_text())["label"] == "dog"
    else:
        with tarfile.open(out / "train-000000.tar") as tar:
            names = tar.getnames()
            fbank = np.load(io.BytesIO(tar.extractfile("a.fbank.npy").read()))
        assert names[:3] == ["a.frame_00.jpg", "a.fbank.npy", "a.json"]
        assert fbank.shape == (8, 8)
    with pytest.raises(SourceError, match="not empty"):
        export(store.uri, str(out), kind)


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_export_has_all_labels_of_a_clip_and_its_group(kind, store, tmp_path):
    commit(store, ["a"], label="Speech", more_labels="Dog, barking|Music", group="recording 7")
    commit(store, ["b"], label=None)
    out = tmp_path / "out"
    export(store.uri, str(out), kind)
    if kind == "folder":
        a, b = (json.loads((out / "train" / name / "clip.json").read_text()) for name in "ab")
    else:
        with tarfile.open(out / "train-000000.tar") as tar:
            a, b = (json.load(tar.extractfile(f"{name}.json")) for name in "ab")
    assert (a["label"], a["group"]) == ("Speech", "recording 7")
    assert a["labels"] == ["Speech", "Dog, barking", "Music"]
    assert (b["label"], b["labels"], b["group"]) == (None, [], None)


def test_every_clip_has_a_key_of_its_own_in_a_webdataset_tar(store, tmp_path):
    ids = ["v1.0", "v1_0", "v1%2E0", "plain"]
    commit(store, ids)
    export(store.uri, str(tmp_path / "out"), "webdataset")
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        names = tar.getnames()
    keys = [name.partition(".")[0] for name in names if name.endswith(".json")]
    assert [unquote(key) for key in keys] == ids
    assert len(names) == len(set(names))
    assert keys[3] == "plain"


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
@pytest.mark.parametrize("split", ["../../escape", "/abs", "..", "a/b", "", None])
def test_export_stays_in_its_folder_whatever_a_split_is_called(kind, split, store, tmp_path):
    commit(store, ["a"])
    commit(store, ["b"], split=split)
    out = tmp_path / "deep" / "out"
    with pytest.raises(SourceError, match="no name for a folder"):
        export(store.uri, str(out), kind)
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


def test_export_to_a_bucket_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commit(store, ["a"])
    with pytest.raises(SourceError, match="s3://b/x: an export goes to a local folder"):
        export(store.uri, "s3://b/x", "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


@pytest.mark.slow
def test_commits_cost_the_same_however_many_there_were(store):
    import time

    rows = pa.Table.from_pylist(
        [{"clip_id": "a", "status": "failed", "reason": "missing", "spec_hash": SPEC.spec_hash()}],
        CLIPS_SCHEMA,
    )
    seconds = []
    for _ in range(192):
        began = time.process_time()
        store.append(rows, {})
        seconds.append(time.process_time() - began)
    assert np.median(seconds[-40:]) < 3 * np.median(seconds[:40]) + 0.005
    assert len(store.snapshot().clips) == 1


@pytest.mark.slow
def test_many_small_runs_leave_few_files_to_read(store):
    row = {"clip_id": "a", "status": "ok", "spec_hash": SPEC.spec_hash()}
    rows = pa.Table.from_pylist([row], CLIPS_SCHEMA)
    for _ in range(100):
        FeatureStore.open(store.uri).append(rows, {})
    assert len(store._load().file_uris()) < 70
    assert store.snapshot().clips["seq"].to_pylist() == [store.version()]


def test_a_place_that_cannot_hold_a_table_is_refused():
    with pytest.raises(StoreError, match=r"cannot lie on memory://. Possible: a local path, s3://"):
        FeatureStore.create("memory://a/store", FeatureSpec())


@pytest.mark.parametrize("name", ["a%20b", "[x]", "x]", "a\\b", "50%", "a b #?ü"])
def test_a_folder_whose_name_the_table_would_mistake_is_refused(name, tmp_path):
    uri = str(tmp_path / name / "store")
    if name in ("50%", "a b #?ü"):
        assert FeatureStore.create(uri, FeatureSpec()).version() == 0
        return
    with pytest.raises(StoreError, match="Name another folder"):
        FeatureStore.create(uri, FeatureSpec())
    assert not Path(uri).exists()


@pytest.mark.parametrize("column", ["group", "more_labels"])
def test_a_store_older_than_a_column_opens_and_is_written_on(column, tmp_path, monkeypatch):
    old = CLIPS_SCHEMA.remove(CLIPS_SCHEMA.get_field_index(column))
    with monkeypatch.context() as before:
        for module in ("store", "shards"):
            if hasattr(importlib.import_module(f"pipeline.store.{module}"), "CLIPS_SCHEMA"):
                before.setattr(f"pipeline.store.{module}.CLIPS_SCHEMA", old)
        before.setitem(globals(), "CLIPS_SCHEMA", old)
        version = commit(FeatureStore.create(str(tmp_path), SPEC), ["a", "b"])
    store = FeatureStore.open(str(tmp_path))
    assert store.snapshot().rows(None)[column].to_pylist() == [None, None]
    commit(store, ["b", "c"], **{column: "new"})
    rows = {row["clip_id"]: row[column] for row in store.snapshot().rows("train").to_pylist()}
    assert rows == {"a": None, "b": "new", "c": "new"}
    assert store.snapshot(version).rows(None)[column].to_pylist() == [None, None]
    assert compact(str(tmp_path))["clips_moved"] >= 0
    assert len(store.snapshot().rows(None)) == 3
