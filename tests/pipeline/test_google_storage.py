"""Clips on a Google Cloud Storage API on 127.0.0.1."""

import socket

import pytest
from gcp_storage_emulator.server import create_server

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.features import fbanks_function
from pipeline.ingest import plan_ingest
from pipeline.storage import Location
from pipeline.store import FeatureStore
from pipeline.synth import write_clips
from pipeline.worker import ShardDecoder

SPEC = FeatureSpec(n_frames=2, frame_size=32, duration_s=1.0, fbank_frames=100)
CONFIG = IngestConfig(shard_clips=5, prefetch=3)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A local folder of 12 clips; the same lie at gs://data/videos."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="data")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        # gcsfs would ask a gRPC endpoint for the kind of the bucket, which this server has not.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        folder = write_clips(tmp_path_factory.mktemp("gs") / "clips", 10, 2, seed=1, size=32).parent
        place = Location("gs://data")
        place.fs.put(f"{folder}/videos/", "data/videos/", recursive=True)
        place.fs.put(f"{folder}/clips.csv", "data/clips.csv")
        yield folder / "videos"
    server.stop()


def ingested(source: str, store_uri: str) -> FeatureStore:
    """Decoded in this process."""
    store = FeatureStore.create(store_uri, SPEC)
    plan = plan_ingest(f"{source}/clips.csv", f"{source}/videos", store_uri, SPEC, CONFIG)
    decoder = ShardDecoder(store_uri, SPEC, CONFIG, "r", fbanks_function(SPEC))
    for states in decoder.decode(0, plan.todo):
        store.append(states, {})
    return store


def test_clips_in_a_bucket_are_read_and_only_changed_ones_again(videos, tmp_path):
    store = ingested("gs://data", str(tmp_path / "store"))
    rows = store.snapshot().rows(None)
    assert len(rows) == 12

    def plan():
        source = ("gs://data/clips.csv", "gs://data/videos")
        return plan_ingest(*source, str(tmp_path / "store"), None, CONFIG).counts

    assert plan()["unchanged"] == 12
    name = min(file.name for file in videos.iterdir())
    bucket = Location("gs://data/videos")
    bucket.write_bytes(name, (videos / name).read_bytes() + b"more")
    assert (plan()["changed"], plan()["unchanged"]) == (1, 11)
