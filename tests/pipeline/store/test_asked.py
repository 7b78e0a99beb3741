"""What readers of a store ask a real S3 API for: the bytes they need, in few requests."""

import io
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.asked import asked_of_shards
from support.stores import N_SHARDS, noise_store
from support.unsteady import Unsteady

from pipeline.config import FeatureSpec
from pipeline.errors import DamagedShard, StoreError
from pipeline.ingest.verify import verify
from pipeline.quality.scan import ScanSettings, scan
from pipeline.quality.stats import compute_stats
from pipeline.store.maintenance import compact, export
from pipeline.store.schema import ROW_GROUP_ROWS
from pipeline.store.shards import read_rows
from pipeline.store.store import FeatureStore

SPEC = FeatureSpec(n_frames=3, frame_size=32, duration_s=1.0, fbank_frames=100, n_mels=16)
N_CLIPS = 300
N_GROUPS = 3 * N_SHARDS
FOOTER = 2**16
"""Bytes that Arrow reads of the end of a file."""
OPENING = 2
"""Its size and its footer."""
SIGNALS = ("frames", "frame_ts_ms", "fbank", "fbank_frames")


@pytest.fixture(scope="module")
def store(bucket: str) -> FeatureStore:
    """Row groups of 0.6 MB, three in each shard."""
    return noise_store(f"{bucket}/store", SPEC, N_CLIPS)


class Asked(NamedTuple):
    n_requests: int
    n_bytes: int


@pytest.fixture(autouse=True)
def forgotten(store: FeatureStore) -> None:
    Unsteady.asked.clear()


def answers() -> Asked:
    """About shards, since the test began."""
    sizes = asked_of_shards()
    return Asked(len(sizes), sum(sizes))


def stored_bytes(store: FeatureStore, *columns: str) -> int:
    """Of all row groups, as compressed."""
    n_bytes = 0
    for name in store.location.files("features"):
        about = pq.ParquetFile(io.BytesIO(store.location.read_bytes(f"features/{name}"))).metadata
        for group in map(about.row_group, range(about.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema.partition(".")[0] in columns:
                    n_bytes += column.total_compressed_size
    Unsteady.asked.clear()
    return n_bytes


def test_a_row_group_costs_its_columns_and_one_request(store: FeatureStore) -> None:
    shard = store.snapshot().rows(None)["shard"][0].as_py()
    rows = np.arange(ROW_GROUP_ROWS)
    whole = stored_bytes(store, "frames", "fbank")
    Unsteady.asked.clear()
    read_rows(store.uri, shard, rows, ["frames", "fbank"], keeps_footer=True)
    n_requests, n_bytes = answers()
    assert n_requests == OPENING + 1
    assert n_bytes < 1.1 * whole * ROW_GROUP_ROWS / N_CLIPS + FOOTER
    read_rows(store.uri, shard, rows, ["frames", "fbank"], keeps_footer=True)
    n_requests, n_bytes = answers()
    assert n_requests == 1
    assert n_bytes < 1.1 * whole * ROW_GROUP_ROWS / N_CLIPS


def test_compact_counts_rows_by_footers(store: FeatureStore) -> None:
    assert compact(store.uri)["clips_moved"] == 0
    n_requests, n_bytes = answers()
    assert n_requests == OPENING * N_SHARDS
    assert n_bytes <= FOOTER * N_SHARDS


def test_verify_opens_each_shard_once_and_reads_keys_alone(store: FeatureStore) -> None:
    assert verify(store.uri, sample=0)["problems"] == []
    n_requests, n_bytes = answers()
    assert n_requests <= OPENING * N_SHARDS + N_GROUPS
    assert n_bytes <= FOOTER * N_SHARDS + stored_bytes(store, "clip_id", "row_key")


def test_a_scan_of_features_opens_each_shard_once(store: FeatureStore) -> None:
    needed = stored_bytes(store, *SIGNALS)
    clips = store.snapshot().clips
    Unsteady.asked.clear()
    measured = pa.concat_tables(scan(clips, ScanSettings(store.uri, SPEC, reads_sources=False)))
    assert len(measured) == N_CLIPS
    n_requests, n_bytes = answers()
    assert n_requests == OPENING * N_SHARDS + N_GROUPS
    assert n_bytes <= 1.1 * needed + FOOTER * N_SHARDS


def test_statistics_open_each_shard_once(store: FeatureStore) -> None:
    needed = stored_bytes(store, "fbank")
    compute_stats(store, store.snapshot(), "train", with_pixels=False)
    n_requests, n_bytes = answers()
    assert n_requests == OPENING * N_SHARDS + N_GROUPS
    assert n_bytes <= 1.1 * needed + FOOTER * N_SHARDS


def test_an_export_reads_a_row_group_once_though_clips_were_dropped(bucket, tmp_path) -> None:
    store = noise_store(f"{bucket}/dropped", SPEC, N_CLIPS)
    clips = store.snapshot().clips
    # Any 64 live clips that follow each other lie in two row groups.
    gone = clips.filter(pa.array([row % ROW_GROUP_ROWS < 9 for row in clips["row"].to_pylist()]))
    status = gone.schema.get_field_index("status")
    removed = pa.array(["removed"] * len(gone), pa.string())
    store.append(gone.set_column(status, gone.schema.field(status), removed), {})
    whole = sum(map(len, map(store.location.read_bytes, features(store))))
    Unsteady.asked.clear()
    assert export(store.uri, str(tmp_path / "out"), "folder")["clips"] == N_CLIPS - len(gone)
    n_requests, n_bytes = answers()
    assert n_requests <= OPENING * N_SHARDS + 2 * N_GROUPS
    assert n_bytes <= whole + FOOTER * N_SHARDS


def features(store: FeatureStore) -> list[str]:
    return [f"features/{name}" for name in sorted(store.location.files("features"))]


@pytest.mark.parametrize("harm", ["gone", "cut", "refused"])
def test_a_shard_that_changed_after_its_footer_was_kept_is_told(store, harm, monkeypatch) -> None:
    shard = features(store)[-1]
    rows, columns = np.arange(70, 80), ["frames"]
    first = read_rows(store.uri, shard, rows, columns, keeps_footer=True)
    content = store.location.read_bytes(shard)
    if harm == "refused":
        monkeypatch.setattr(Unsteady, "refused", shard)
    elif harm == "gone":
        store.location.remove(shard)
    else:
        store.location.write_bytes(shard, content[: len(content) // 4])
    with pytest.raises(StoreError, match=shard) as caught:
        read_rows(store.uri, shard, rows, columns, keeps_footer=True)
    assert isinstance(caught.value, DamagedShard) == (harm != "refused")
    monkeypatch.setattr(Unsteady, "refused", "")
    store.location.write_bytes(shard, content)
    assert read_rows(store.uri, shard, rows, columns, keeps_footer=True).equals(first)
