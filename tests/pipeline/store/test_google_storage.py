"""Clips and stores on a Google Cloud Storage API on 127.0.0.1."""

import http.client
import http.server
import threading
from urllib.parse import quote, unquote, urlsplit

import boto3
import pytest
from gcp_storage_emulator.server import create_server
from support.ports import free_port
from support.s3 import s3_server

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.errors import StoreLocked
from pipeline.ingest.run import ingest, plan_ingest
from pipeline.ingest.verify import verify
from pipeline.storage import Location
from pipeline.store.lease import Lease
from pipeline.store.store import FeatureStore
from pipeline.synth import write_clips

SPEC = FeatureSpec(n_frames=2, frame_size=32, duration_s=1.0, fbank_frames=100)
CONFIG = IngestConfig(shard_clips=5, prefetch=3, commit_shards=1)


class BothApis(http.server.BaseHTTPRequestHandler):
    """One address for Google's two APIs, as the real one: JSON by the emulator of it; XML, which
    the emulator lacks and the Delta library speaks, by the S3 server it is nearly equal to."""

    protocol_version = "HTTP/1.1"
    json_api = xml_api = ("127.0.0.1", 0)

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked, path = dict(self.headers), self.path
        place = self.json_api
        if not path.startswith(("/storage/", "/upload/", "/download/", "/batch")):
            place, parts = self.xml_api, urlsplit(path)
            path = f"{quote(unquote(parts.path))}?{parts.query}"
            scope = "testing/20200101/us-east-1/s3/aws4_request"
            asked = {"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, Signature=x"}
            if self.headers.get("Range"):
                asked["Range"] = self.headers["Range"]
            if self.headers.get("x-goog-if-generation-match") == "0":
                asked["If-None-Match"] = "*"
        connection = http.client.HTTPConnection(*place, timeout=30)
        connection.request(self.command, path, body, asked)
        self.reply(connection.getresponse())
        connection.close()

    def reply(self, answer: http.client.HTTPResponse) -> None:
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(body)))
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = answer

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A local folder of 12 clips; the same lie at gs://data/videos."""
    BothApis.json_api = ("127.0.0.1", free_port())
    emulator = create_server(*BothApis.json_api, in_memory=True, default_bucket="data")
    emulator.start()
    front = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BothApis)
    threading.Thread(target=front.serve_forever, daemon=True).start()
    with s3_server() as BothApis.xml_api, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{front.server_port}")
        # gcsfs would ask a gRPC endpoint for the kind of the bucket, which this server has not.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        host, port = BothApis.xml_api
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        client = boto3.client("s3", "us-east-1", endpoint_url=f"http://{host}:{port}", **keys)
        client.create_bucket(Bucket="data")
        folder = write_clips(tmp_path_factory.mktemp("gs") / "clips", 10, 2, seed=1, size=32).parent
        place = Location("gs://data")
        place.fs.put(f"{folder}/videos/", "data/videos/", recursive=True)
        place.fs.put(f"{folder}/clips.csv", "data/clips.csv")
        yield folder / "videos"
    front.shutdown()
    emulator.stop()


def ingested(source: str, store_uri: str) -> FeatureStore:
    """Of so few clips that Ray is not started."""

    def no_ray() -> None:
        raise AssertionError("Ray for twelve clips")

    ingest(
        f"{source}/clips.csv", f"{source}/videos", store_uri, SPEC, CONFIG,
        start_ray=no_ray, on_progress=lambda progress: None,
    )  # fmt: skip
    return FeatureStore.open(store_uri)


@pytest.mark.slow
def test_a_store_in_a_bucket_holds_what_a_local_one_holds(videos, tmp_path):
    there = ingested("gs://data", "gs://data/store")
    here = ingested(str(videos.parent), str(tmp_path / "store"))
    assert verify(there.uri, sample=12)["problems"] == []
    columns = ["clip_id", "label", "split", "row"]
    rows = [store.snapshot().rows(None).select(columns).to_pylist() for store in (there, here)]
    assert len(rows[0]) == 12
    assert sorted(map(str, rows[0])) == sorted(map(str, rows[1]))
    assert there.version() == here.version() > 1
    there.pin(there.version(), "run-1")
    assert there.pins() == {"run-1": there.version()}
    first, second = (Lease(there.location, 30.0, name) for name in ("the first", "the second"))
    with first, pytest.raises(StoreLocked, match="the first"):
        second.__enter__()


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
