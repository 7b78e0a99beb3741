"""Which spec is in force, and that a clip's features are of the spec they are said to be of."""

import numpy as np
import pytest
from support.cheap_source import CHEAP_SPECS, CheapSource, features

from pipeline.errors import MassRemoval, StoreLocked, TooManyFailures
from pipeline.ingest.verify import verify
from pipeline.store.lease import Lease
from pipeline.store.maintenance import compact, failures, status, vacuum
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.shards import ShardWriter, read_rows
from pipeline.store.store import FeatureStore

OLD, NEW = CHEAP_SPECS


@pytest.fixture
def source(tmp_path, monkeypatch) -> CheapSource:
    """Ten clips, ingested with the old spec."""
    made = CheapSource(tmp_path, 10, monkeypatch)
    made.ingest(OLD, fingerprint="sha256")
    return made


def stored(source: CheapSource, version: int | None = None) -> dict[str, str]:
    """Feature bytes of the live clips."""
    found = {}
    snapshot = FeatureStore.open(source.store).snapshot(version)
    for row in snapshot.rows(None).to_pylist():
        table = read_rows(source.store, row["shard"], np.array([row["row"]]), ["frames"])
        found[row["clip_id"]] = table["frames"][0].as_py()[0].decode()
    return found


def of(spec, clips: list[str]) -> dict[str, str]:
    return {clip: features(spec.spec_hash(), clip, "good") for clip in clips}


def test_clips_copied_to_another_disk_are_decoded_for_another_spec(source):
    source.touch()
    summary = source.ingest(NEW, fingerprint="sha256")
    assert (summary.spec_changed, summary.changed, summary.unchanged) == (10, 0, 0)
    assert sorted(source.decoded) == source.clips
    assert stored(source) == of(NEW, source.clips)


def test_a_touched_clip_that_failed_in_passing_is_tried_again(source):
    source.file("c3").write_text("slow")
    source.ingest(fingerprint="sha256")
    source.touch()
    summary = source.ingest(fingerprint="sha256")
    assert (summary.retried, summary.unchanged) == (1, 9)


def stop(source: CheapSource, spec, after: int, **options) -> None:
    """An ingest that is interrupted when that many shards were decoded."""

    def stop_now() -> None:
        nonlocal after
        after -= 1
        if after < 0:
            raise KeyboardInterrupt

    source.before_shard = stop_now
    with pytest.raises(KeyboardInterrupt):
        source.ingest(spec, **options)
    source.before_shard = lambda: None


@pytest.mark.parametrize("after", [0, 2])
def test_a_stopped_run_of_another_spec_leaves_what_was_live(source, after):
    source.file("c4").unlink()
    kept = [clip for clip in source.clips if clip != "c4"]
    stop(source, NEW, after)
    assert stored(source) == of(OLD, kept)
    about = status(source.store)
    assert (about["ok"], about["missing"], about["failed"]) == (9, 1, 0)
    again = source.ingest(NEW)
    assert again.ok == 9 - 3 * after
    assert stored(source) == of(NEW, kept)


def test_going_back_to_the_old_spec_brings_it_back_without_a_decode(source):
    before = FeatureStore.open(source.store).snapshot()
    source.ingest(NEW)
    assert stored(source) == of(NEW, source.clips)
    assert stored(source, before.version) == of(OLD, source.clips)
    back = source.ingest(OLD)
    assert (back.unchanged, source.decoded) == (10, [])
    after = FeatureStore.open(source.store).snapshot()
    assert (after.spec, after.digest) == (OLD, before.digest)
    assert after.version > before.version
    assert source.ingest().version == after.version, "what is in force is nothing to do"


def test_a_run_without_a_spec_takes_the_one_in_force(source):
    stop(source, NEW, 1)
    summary = source.ingest()
    assert (summary.unchanged, source.decoded) == (10, [])
    assert FeatureStore.open(source.store).snapshot().spec == OLD


def test_compact_keeps_the_old_spec_and_vacuum_forgets_it_after_the_retention(source):
    source.ingest(NEW)
    compact(source.store)
    vacuum(source.store, retention_hours=1.0)
    source.ingest(OLD)
    assert source.decoded == []
    assert stored(source) == of(OLD, source.clips)
    source.ingest(NEW)
    assert vacuum(source.store, retention_hours=0.0)["shards"] == 4
    assert verify(source.store, sample=0)["problems"] == []
    source.ingest(OLD)
    assert sorted(source.decoded) == source.clips
    assert stored(source) == of(OLD, source.clips)


def test_vacuum_keeps_the_spec_of_a_pinned_version(source):
    store = FeatureStore.open(source.store)
    store.pin(store.version(), "run-1")
    source.ingest(NEW)
    vacuum(source.store, retention_hours=0.0)
    assert stored(source, store.pins()["run-1"]) == of(OLD, source.clips)
    source.ingest(OLD)
    assert source.decoded == []


def test_verify_finds_features_of_another_spec(source):
    """As diccae wrote them before the spec was committed."""
    store = FeatureStore.open(source.store)
    rows = store.snapshot().clips.slice(0, 2)
    index = CLIPS_SCHEMA.get_field_index("spec_hash")
    named = rows.set_column(index, CLIPS_SCHEMA.field(index), [[NEW.spec_hash()] * 2])
    source.ingest(NEW)
    store.append(named, {})
    report = verify(source.store, sample=0, repair=True)
    assert {problem["clip_id"] for problem in report["problems"]} == set(
        named["clip_id"].to_pylist()
    )
    assert f"features of spec {OLD.spec_hash()}" in report["problems"][0]["problem"]
    source.ingest(NEW)
    assert stored(source) == of(NEW, source.clips)


def test_missing_clips_are_no_failed_decodes(tmp_path, monkeypatch):
    """As with VGGSound's whole test list and a few of its clips."""
    source = CheapSource(tmp_path, 200, monkeypatch)
    for clip in source.clips[10:]:
        source.file(clip).unlink()
    source.file("c0").write_text("bad")
    summary = source.ingest(OLD, max_failed_frac=0.1)
    assert (summary.new, summary.missing, summary.ok, summary.failed) == (10, 190, 9, 1)
    about = status(source.store)
    assert (about["clips"], about["ok"], about["failed"], about["missing"]) == (200, 9, 1, 190)
    assert about["by_reason"] == {"open_failed": 1}
    assert failures(source.store, examples=1)["missing"]["clips"] == 190
    source.file("c1").write_text("bad now")
    source.file("c2").write_text("bad now")
    with pytest.raises(TooManyFailures, match=r"2 of 2 clips failed \(open_failed 2\)"):
        source.ingest(max_failed_frac=0.1)


def test_a_spec_under_which_too_many_fail_is_not_put_in_force(source):
    for clip in source.clips[:5]:
        source.file(clip).write_text("bad")
    for n_decoded in (10, 0):
        with pytest.raises(TooManyFailures, match=r"5 of 10 clips failed .*in force stays"):
            source.ingest(NEW, max_failed_frac=0.1)
        assert len(source.decoded) == n_decoded, "the same again is no way around"
        assert FeatureStore.open(source.store).snapshot().spec == OLD
        assert stored(source) == of(OLD, source.clips)
    source.ingest(NEW, max_failed_frac=0.5)
    assert stored(source) == of(NEW, source.clips[5:])


def test_mass_removal_counts_neither_way_what_was_missing_before(tmp_path, monkeypatch):
    source = CheapSource(tmp_path, 60, monkeypatch)
    for clip in source.clips[20:]:
        source.file(clip).unlink()
    source.ingest(OLD)
    unlisted, source.clips = source.clips[20:], source.clips[:20]
    assert source.ingest().removed == len(unlisted), "no clip that was there is gone"
    source.clips = source.clips[:12]
    with pytest.raises(MassRemoval, match="8 of the 20 clips"):
        source.ingest()


def test_a_run_that_lost_its_lease_commits_nothing_over_its_successor(source, monkeypatch):
    def come() -> None:
        source.before_shard = lambda: None
        monkeypatch.setattr("pipeline.store.lease.Lease._is_alive", lambda *args: False)
        source.ingest(OLD)

    source.file("c0").write_text("good again")
    source.before_shard = come
    with pytest.raises(StoreLocked, match="lost its lease"):
        source.ingest(NEW)
    assert FeatureStore.open(source.store).snapshot().spec == OLD
    assert stored(source)["c0"].endswith("good again")


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
def test_a_run_that_lost_its_lease_leaves_the_unfinished_shards_of_its_successor(
    source, monkeypatch, end
):
    """Stopped for a while, it may end before it has rows to commit, which would tell it."""
    location = FeatureStore.open(source.store).location
    left: list[ShardWriter] = []

    def lose_and_end() -> None:
        monkeypatch.setattr("pipeline.store.lease.Lease._is_alive", lambda *args: False)
        with Lease(location, 30.0, "the successor"):
            for run_id in ("successor", source.run_id):
                left.append(ShardWriter(location, f"features/part-{run_id}-000000-0.parquet", OLD))
                left[-1].add({"clip_id": "c0", "row_key": "key"})
        raise end

    source.file("c0").write_text("good again")
    source.before_shard = lose_and_end
    with pytest.raises(end):
        source.ingest()
    left[0].publish()
    assert len(read_rows(source.store, left[0].name, None, ["clip_id"])) == 1
    with pytest.raises(FileNotFoundError):
        left[1].publish()
