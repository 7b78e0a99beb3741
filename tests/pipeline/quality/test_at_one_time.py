"""Two `diccae store quality` on one store at one time: both end well, and lose nothing."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from support.polling import wait_until

from diccae.cli import main
from pipeline.quality import run as quality_run
from pipeline.quality.table import read_about
from pipeline.storage import Location
from pipeline.store.store import FeatureStore

KEPT_EVERY_CLIP = "pipeline.quality.run._KEEP_EVERY_CLIPS"


def _rows(store: str) -> list[dict]:
    return pq.read_table(f"{store}/quality/table.parquet").sort_by("clip_id").to_pylist()


def _parts(store: str) -> list[Path]:
    return list(Path(store, "quality", "parts").glob("*"))


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Has the next scan do something when it has measured its first clips and kept them."""
    monkeypatch.setattr("pipeline.quality.scan._FEWEST_FOR_PROCESSES", 1000)

    def set_up(act: Callable[[], object]) -> None:
        whole = quality_run.scan

        def scan(clips, settings, workers):
            monkeypatch.setattr(quality_run, "scan", whole)
            yield from whole(clips.slice(0, 3), settings, workers)
            act()
            yield from whole(clips.slice(3), settings, workers)

        monkeypatch.setattr(quality_run, "scan", scan)

    return set_up


@pytest.mark.slow
def test_calls_for_two_splits_both_stay_in_the_table(copy, quality, meanwhile) -> None:
    for split in ("test", "train"):
        quality(copy.store, "--split", split)
    one_by_one = _rows(copy.store)
    shutil.rmtree(Path(copy.store, "quality"))
    inner = []
    meanwhile(lambda: inner.append(quality(copy.store, "--split", "test")["looked_at"]))
    outer = quality(copy.store, "--split", "train")["looked_at"]
    assert (inner, outer) == ([1], len(one_by_one) - 1)
    assert _rows(copy.store) == one_by_one
    assert quality(copy.store)["looked_at"] == 0


def test_what_a_call_kept_that_is_stopped_later_is_not_lost_by_another(
    copy, quality, meanwhile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KEPT_EVERY_CLIP, 1)
    n_clips = len(FeatureStore.open(copy.store).snapshot().clips)

    def other_call_then_a_stop() -> None:
        assert _parts(copy.store)
        assert quality(copy.store, "--split", "test")["looked_at"] == 1
        raise KeyboardInterrupt

    meanwhile(other_call_then_a_stop)
    assert main(["store", "quality", "--store", copy.store, "--split", "train"]) == 130
    assert quality(copy.store)["looked_at"] == n_clips - 3 - 1
    assert _parts(copy.store) == []


def test_parts_that_come_while_another_call_writes_stay(
    copy, quality, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quality_run.write_table
    late = Path(copy.store, "quality", "parts", "late.parquet")

    def write_table(*args, **options) -> None:
        late.parent.mkdir(exist_ok=True)
        late.write_bytes(Path(copy.store, "quality", "early.parquet").read_bytes())
        whole(*args, **options)

    quality(copy.store)
    shutil.copy(Path(copy.store, "quality", "table.parquet"), late.parents[1] / "early.parquet")
    monkeypatch.setattr(quality_run, "write_table", write_table)
    quality(copy.store)
    assert _parts(copy.store) == [late]


def test_a_call_that_would_write_waits_for_one_that_does(
    copy, quality, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = quality_run.write_table
    codes: list[int] = []
    second = threading.Thread(
        target=lambda: codes.append(main(["store", "quality", "--store", copy.store]))
    )

    def write_table(*args, **options) -> None:
        monkeypatch.setattr(quality_run, "write_table", whole)
        second.start()
        wait_until(lambda: caplog.messages, 60, "the second call to wait")
        whole(*args, **options)

    monkeypatch.setattr(quality_run, "write_table", write_table)
    assert main(["store", "quality", "--store", copy.store, "--split", "test"]) == 0
    second.join(60)
    assert codes == [0]
    (said,) = caplog.messages
    assert "locked by store quality" in said
    assert said.endswith("Waiting for it.")
    assert len(_rows(copy.store)) == len(FeatureStore.open(copy.store).snapshot().clips)


def test_a_call_does_not_take_back_what_one_of_a_newer_version_found(
    copy, quality, meanwhile
) -> None:
    store = FeatureStore.open(copy.store)
    clips = store.snapshot().clips
    row = clips.filter(pc.equal(clips["clip_id"], "good3_000000"))
    at = row.column_names.index("row_key")

    def change_and_look() -> None:
        store.append(row.set_column(at, row.schema.field(at), pa.array(["another"])), {})
        quality(copy.store)

    meanwhile(change_and_look)
    told = quality(copy.store)
    assert told["version"] == read_about(Location(copy.store))["version"] == store.version()
    (now,) = (one for one in _rows(copy.store) if one["clip_id"] == "good3_000000")
    assert (now["row_key"], now["in_store"]) == ("another", True)


def test_a_look_at_stored_features_alone_leaves_what_another_call_read(
    copy, quality, meanwhile
) -> None:
    meanwhile(lambda: quality(copy.store))
    quality(copy.store, "--stored-only")
    (now,) = (one for one in _rows(copy.store) if one["clip_id"] == "clipped_000000")
    assert (now["source"], now["clipped"]) == ("read", True)
