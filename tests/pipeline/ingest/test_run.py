"""An ingest of real clips, without Ray: exact counts, pinned versions, nothing done twice."""

import hashlib
import os
import shutil
import subprocess
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.stores import contents

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.decode.clip import extract
from pipeline.decode.payload import decode_jpegs, fbank_array
from pipeline.errors import MassRemoval, PipelineError, SourceError, StoreError, TooManyFailures
from pipeline.ingest.run import Progress, _Run, ingest, plan_ingest
from pipeline.ingest.verify import verify
from pipeline.store.lease import Lease
from pipeline.store.maintenance import failures, status
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.store import FeatureStore, read_rows


def test_first_ingest_stores_every_clip(done):
    summary = done.summary
    assert done.counts(summary) == {"new": 48, "ok": 48}
    assert list(summary.to_json()) == [
        "new", "changed", "spec_changed", "removed", "missing", "unchanged", "retried",
        "set_aside", "ok", "failed", "seconds", "version",
    ]  # fmt: skip
    assert done.progress[-1].done == done.progress[-1].committed == 48
    about = status(done.store)
    assert (about["clips"], about["ok"], about["failed"]) == (48, 48, 0)
    assert about["by_split"] == {"test": 8, "train": 40}
    assert about["bytes"] == sum(f.stat().st_size for f in Path(done.store, "features").iterdir())


def test_stored_rows_are_what_the_decoder_gives(done):
    snapshot = done.snapshot()
    rows = snapshot.rows(None)
    assert len(set(rows["clip_id"].to_pylist())) == 48
    assert len(snapshot.classes) == 8
    for row in rows.slice(0, 5).to_pylist():
        columns = ["clip_id", "frames", "frame_ts_ms", "fbank", "fbank_frames"]
        at = np.array([row["row"]])
        stored = read_rows(done.store, row["shard"], at, columns).to_pylist()[0]
        assert stored["clip_id"] == row["clip_id"]
        clip = extract(str(done.videos / f"{row['clip_id']}.mp4"), None, None, done.spec)
        assert stored["frames"] == clip.frames
        assert stored["frame_ts_ms"] == clip.frame_ts_ms
        assert decode_jpegs(stored["frames"]).shape == (4, 48, 48, 3)
        assert fbank_array(stored["fbank"], done.spec).shape == (200, 128)
        assert stored["fbank_frames"] == 198


def test_rows_can_be_read_in_any_order(done):
    shard = done.snapshot().rows(None)["shard"][0].as_py()
    everything = read_rows(done.store, shard, None, ["clip_id"])["clip_id"].to_pylist()
    order = np.random.default_rng(0).permutation(len(everything))
    shuffled = read_rows(done.store, shard, order, ["clip_id"])["clip_id"].to_pylist()
    assert shuffled == [everything[i] for i in order]


def test_second_ingest_does_nothing(source):
    again = source.ingest(local_clips=0)
    assert source.counts(again) == {"unchanged": 48}
    assert source.n_ray_starts == 0
    assert again.version == source.summary.version


def test_touched_added_and_deleted_files_are_counted_exactly(source):
    before = source.snapshot()
    pinned = (before.version, before.digest, before.rows(None))
    touched, deleted, *rest = source.files()
    os.utime(touched, ns=(1, 1))
    deleted.unlink()
    with source.csv.open("a") as csv:
        for i in range(2):
            shutil.copy(rest[i], source.videos / f"-added0000{i}_000007.mp4")
            csv.write(f'-added0000{i},7,"a new, odd label",test\n')
    bytes_before = status(source.store)["bytes"]
    summary = source.ingest()
    assert source.counts(summary) == {
        "new": 2, "changed": 1, "removed": 1, "unchanged": 46, "ok": 3,
    }  # fmt: skip
    written = status(source.store)["bytes"] - bytes_before
    assert written <= 1.2 * 3 * bytes_before / 48, "more was written than the three clips decoded"
    assert source.counts(source.ingest()) == {"unchanged": 50}
    after = source.snapshot()
    assert "a new, odd label" in after.classes
    assert deleted.stem not in after.rows(None)["clip_id"].to_pylist()
    assert failures(source.store, examples=1)["missing"]["examples"][0]["clip_id"] == deleted.stem
    # The older version still is what it was.
    old = source.snapshot(pinned[0])
    assert (old.digest, old.rows(None)) == pinned[1:]
    assert after.digest != old.digest


def test_another_spec_redoes_all_and_the_old_version_keeps_its_own(source):
    old = source.snapshot()
    spec = source.spec.model_copy(update={"n_frames": 2})
    summary = source.ingest(spec)
    assert source.counts(summary) == {"spec_changed": 48, "ok": 48}
    assert source.snapshot().spec == spec
    pinned = source.snapshot(old.version)
    assert pinned.spec == source.spec
    row = pinned.rows("test").to_pylist()[0]
    stored = read_rows(source.store, row["shard"], np.array([row["row"]]), ["frames"])
    assert len(stored["frames"][0].as_py()) == 4
    assert source.counts(source.ingest()) == {"unchanged": 48}


def test_broken_clips_are_rows_with_reasons_and_too_many_of_them_exit_3(source):
    for file, content in zip(source.files()[:6], [b"", b"text", b"\0" * 9999] * 2, strict=False):
        file.write_bytes(content)
    with pytest.raises(TooManyFailures) as caught:
        source.ingest()
    assert caught.value.exit_code == 3
    assert (caught.value.summary["changed"], caught.value.summary["failed"]) == (6, 6)
    about = status(source.store)
    assert (about["ok"], about["by_reason"]) == (42, {"open_failed": 6})
    # Quarantined: not tried again until asked or changed.
    assert source.counts(source.ingest()) == {"unchanged": 48}
    retry = source.config.model_copy(update={"retry_failed": True})
    plan = plan_ingest(str(source.csv), str(source.videos), source.store, None, retry)
    assert plan.counts["retried"] == 6


def test_relabelled_clip_is_not_decoded_again(source):
    lines = source.csv.read_text().splitlines()
    ytid, start, _ = lines[0].split(",", 2)
    source.csv.write_text("\n".join([f"{ytid},{start},renamed,test", *lines[1:]]))
    assert source.counts(source.ingest(local_clips=0)) == {"changed": 1, "unchanged": 47}
    assert source.n_ray_starts == 0
    assert "renamed" in source.snapshot().classes


def test_a_touch_costs_only_a_hash_with_content_fingerprints(source):
    source.store += "-sha"
    source.ingest(source.spec, fingerprint="sha256")
    touched, changed, *_ = source.files()
    os.utime(touched, ns=(1, 1))
    shutil.copy(touched, changed)
    summary = source.ingest(fingerprint="sha256")
    assert source.counts(summary) == {"changed": 1, "unchanged": 47, "ok": 1}
    assert source.counts(source.ingest(fingerprint="sha256")) == {"unchanged": 48}


def test_empty_source_changes_nothing(source):
    before = source.snapshot()
    for file in source.files()[:30]:
        file.unlink()
    with pytest.raises(MassRemoval, match="30 of the 48"):
        source.ingest()
    for file in source.files():
        file.unlink()
    with pytest.raises(SourceError, match="mounted"):
        source.ingest()
    assert source.snapshot().version == before.version
    assert source.snapshot().digest == before.digest


@pytest.mark.slow
@pytest.mark.parametrize("fingerprint", ["stat", "sha256"])
def test_a_source_that_is_unmounted_while_it_is_decoded_ends_no_data_set(
    source, undisturbed, fingerprint
):
    spec = source.spec.model_copy(update={"n_frames": 2})
    away = source.videos.with_name("away")

    def unmount(progress):
        if not away.exists():
            source.videos.rename(away)
            source.videos.mkdir()

    options = {"shard_clips": 4, "commit_shards": 1, "fingerprint": fingerprint}
    with pytest.raises(MassRemoval, match="vanished since the run began") as caught:
        source.ingest(spec, unmount, **options)
    assert caught.value.exit_code == 2
    about = status(source.store)
    assert (about["ok"], about["failed"], about["missing"]) == (48, 0, 0)
    assert contents(source.store) == undisturbed
    source.videos.rmdir()
    away.rename(source.videos)
    again = source.ingest(spec, **options)
    assert 0 < again.ok < 48, "what was decoded before is kept"
    assert (again.ok + again.unchanged, source.snapshot().spec) == (48, spec)
    assert source.counts(source.ingest(source.spec)) == {"unchanged": 48}


def test_one_file_that_vanishes_while_others_are_decoded_is_missing(source):
    source.store += "-again"
    # Decoded last: shards are in the order of a hash of the ids.
    *_, last = sorted(
        source.files(), key=lambda file: hashlib.blake2b(file.stem.encode(), digest_size=8).digest()
    )
    summary = source.ingest(source.spec, lambda progress: last.unlink(True), shard_clips=4)
    assert (summary.ok, summary.failed) == (47, 0)
    assert failures(source.store, examples=1)["missing"]["examples"][0]["clip_id"] == last.stem
    assert source.counts(source.ingest()) == {"unchanged": 48}


def test_plan_says_what_would_be_done_and_changes_nothing(source):
    os.utime(source.files()[0], ns=(1, 1))
    plan = plan_ingest(str(source.csv), str(source.videos), source.store, None, source.config)
    assert plan.todo.select(["clip_id", "why"]).to_pylist() == [
        {"clip_id": source.files()[0].stem, "why": "changed"}
    ]
    assert source.snapshot().version == source.summary.version


def test_truncated_shard_is_found_told_and_healed(source, undisturbed):
    store = source.store
    rows = FeatureStore.open(store).snapshot().rows(None)
    shard = rows["shard"][0].as_py()
    path = Path(store, shard)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(StoreError, match="--repair"):
        read_rows(store, shard, None, ["clip_id"])
    n_bad = rows["shard"].to_pylist().count(shard)
    assert len(verify(store, sample=4)["problems"]) == n_bad
    assert verify(store, sample=4, repair=True)["repaired"] == n_bad
    again = source.ingest()
    assert (again.new, again.ok) == (n_bad, n_bad)
    assert verify(store, sample=48)["problems"] == []
    assert contents(store) == undisturbed


def test_file_replaced_while_it_is_read_is_stored_with_what_was_read(source):
    """The decoder itself swaps a file in: fingerprint and features must be those of one file."""
    source.store += "-again"
    source.ingest(source.spec, extractor="tests.pipeline.poison:extract_and_replace")
    assert verify(source.store, sample=48)["problems"] == []
    assert source.counts(source.ingest()) == {"unchanged": 48}


def test_clips_of_a_part_whose_names_hold_its_separator_are_read(source, tmp_path):
    folder = tmp_path / "set #1"
    folder.mkdir()
    names = ("plain.mp4", "take #2.mp4", "#3.mp4", "old.tar#4.mp4")
    with tarfile.open(folder / "part_00.tar", "w") as tar:
        for name, path in zip(names, source.files(), strict=False):
            tar.add(path, name)
    where = (None, str(folder), str(tmp_path / "in_parts"), source.spec)
    plan = plan_ingest(*where, source.config, probe=True)
    assert (plan.counts["new"], plan.timelines["in_parts"]) == (4, 4)
    ingest(*where, source.config, start_ray=lambda: None, on_progress=source.progress.append)
    clips = FeatureStore.open(where[2]).snapshot().clips.to_pylist()
    assert {clip["uri"].removeprefix(f"{folder}/part_00.tar#") for clip in clips} == set(names)
    assert {clip["clip_id"]: clip["reason"] for clip in clips if clip["status"] != "ok"} == {}


def test_a_clip_that_was_too_large_is_tried_again_by_a_run_that_allows_its_size(source, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    small, *_, large = sorted(source.files(), key=lambda file: file.stat().st_size)
    with tarfile.open(parts / "part_00.tar", "w") as tar:
        for file in (small, large):
            tar.add(file, file.name)
    options = {"start_ray": lambda: None, "on_progress": source.progress.append}

    def run(most_bytes: int) -> dict:
        config = source.config.model_copy(
            update={"max_clip_bytes": most_bytes, "max_failed_frac": 1.0}
        )
        store = str(tmp_path / "in_parts")
        return source.counts(ingest(None, str(parts), store, source.spec, config, **options))

    size = large.stat().st_size
    assert run(size - 1) == {"new": 2, "ok": 1, "failed": 1}
    assert run(size - 1) == {"unchanged": 2}
    assert run(size) == {"retried": 1, "unchanged": 1, "ok": 1}


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """The folder of temporary files, of this test alone."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_windows_of_one_video_in_a_part_are_those_of_its_file(done, moving_clip, scratch, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    shutil.copy(moving_clip, parts / "untrimmed00.mp4")
    csv = tmp_path / "clips.csv"
    csv.write_text("".join(f"untrimmed00,{start},dog,train\n" for start in range(5)))
    stores = [str(tmp_path / name) for name in ("of_file", "of_part")]
    options = {"start_ray": lambda: None, "on_progress": lambda progress: None}
    config = IngestConfig(workers=1, shard_clips=2)
    ingest(str(csv), str(parts), stores[0], done.spec, config, **options)
    with tarfile.open(parts / "p.tar", "w") as tar:
        tar.add(parts / "untrimmed00.mp4", "untrimmed00.mp4")
    (parts / "untrimmed00.mp4").unlink()
    summary = ingest(str(csv), str(parts), stores[1], done.spec, config, **options)
    assert (summary.ok, summary.failed) == (5, 0)
    # The row_key tells the two files apart.
    of_file, of_part = [
        [(clip_id, *payload) for clip_id, _, *payload in contents(store)] for store in stores
    ]
    assert of_part == of_file
    assert len({frames for _, frames, *_ in of_part}) == 5
    assert [path.name for path in scratch.rglob("*") if path.is_file()] == ["lock"]


def test_probe_counts_timelines_that_frame_counting_gets_wrong(moving_clip, ffmpeg, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(moving_clip, videos / "clean000000_000000.mp4")
    ffmpeg("-ss", "3.3", "-i", moving_clip, "-c", "copy", videos / "cut00000000_000001.mp4")
    (videos / "broken00000_000002.mp4").write_bytes(b"no video")
    shutil.copy(moving_clip, tmp_path / "inpart00000_000003.mp4")
    with tarfile.open(videos / "part_00.tar", "w") as tar:
        tar.add(tmp_path / "inpart00000_000003.mp4")
    csv = tmp_path / "clips.csv"
    names = ["clean000000", "cut00000000", "broken00000", "inpart00000"]
    csv.write_text("".join(f"{name},{i},dog,train\n" for i, name in enumerate(names)))
    store = tmp_path / "store"
    plan = plan_ingest(str(csv), str(videos), str(store), None, IngestConfig(), probe=True)
    assert plan.counts["new"] == 4
    found = plan.timelines
    examples = found.pop("examples")
    assert found == {"clean": 1, "unclean": 1, "unreadable": 1, "in_parts": 1}
    assert list(examples) == ["cut00000000_000001"]
    assert "discard" in examples["cut00000000_000001"]
    assert not store.exists()


def test_a_probe_keeps_to_the_limits_of_the_config(source, monkeypatch):
    for file in source.files()[:2]:
        os.utime(file, ns=(1, 1))
    start, started = subprocess.Popen, []

    def child(*args, **options):
        started.append(args)
        return start(*args, **options)

    monkeypatch.setattr("pipeline.decode.sandbox.subprocess.Popen", child)
    config = source.config.model_copy(update={"child_clips": 1})
    where = str(source.csv), str(source.videos), source.store
    plan = plan_ingest(*where, None, config, probe=True)
    assert plan.timelines["clean"] + plan.timelines["unclean"] == len(started) == 2


def test_opening_what_is_no_store_says_so(tmp_path):
    with pytest.raises(PipelineError, match="no feature store here"):
        FeatureStore.open(str(tmp_path / "nothing"))


def test_pace_and_time_left_count_from_the_first_clip(tmp_path):
    shown: list[Progress] = []
    store = FeatureStore.create(str(tmp_path / "store"), FeatureSpec())
    lease = Lease(store.location, 30.0, "me")
    run = _Run(store, FeatureSpec(), IngestConfig(), lease, 30, shown.append, lambda: None)
    first = datetime.now(UTC) - timedelta(seconds=5)
    clip = dict.fromkeys(CLIPS_SCHEMA.names) | {"status": "ok", "decoded_at": first}
    run._take(pa.Table.from_pylist([clip] * 10, CLIPS_SCHEMA))
    run._report()
    assert shown[0].clips_per_s == pytest.approx(2.0, rel=0.1)
    assert shown[0].eta_s == pytest.approx(10.0, rel=0.1)
