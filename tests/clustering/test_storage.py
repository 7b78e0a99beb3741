"""Rounds on an S3 API give the bits of rounds on a disk; local files appear whole."""

from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from support.s3 import s3_server

from clustering import storage
from clustering.config import KMeansConfig, PoolConfig
from clustering.rounds.files import load_round
from clustering.rounds.local import LocalRounds
from clustering.rounds.protocol import RoundRequest
from clustering.vectors.cluster import cluster_vectors


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    with s3_server() as (host, port):
        settings = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="run")
        yield "s3://run"


def test_rounds_on_s3_have_the_bits_of_rounds_on_disk(
    bucket: str, features, push_all, streams, round_digest, tmp_path: Path
) -> None:
    digests = []
    for uri in (str(tmp_path), f"{bucket}/a/rounds"):
        rounds = LocalRounds(KMeansConfig(k=8), streams, uri, keep_vectors=1)
        push_all(rounds, features(), 100)
        for number in (1, 2):
            rounds.start(RoundRequest(number, 100, 120, posterior_temperature=0.1))
            rounds.wait(number, 120)
        rounds.save(f"{uri}/bank-1")
        rounds.restore(f"{uri}/bank-1")
        assert rounds.stats().rows == 1500
        assert "vectors" not in storage.names(f"{uri}/round-0001")
        digests.append(round_digest(load_round(uri, 2)))
    assert digests[0] == digests[1]


def test_vectors_are_read_from_and_results_written_to_s3(bucket: str, mixture) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = mixture(n=600, k=4)
    table = pa.table({"embedding": data.x.tolist()})
    with fsspec.open(f"{bucket}/vectors/part-0.parquet", "wb") as handle:
        pq.write_table(table, handle)
    made = cluster_vectors(
        f"{bucket}/vectors",
        f"{bucket}/out",
        KMeansConfig(k=4),
        PoolConfig(n_actors=1),
        seed=0,
        column="embedding",
    )
    assert storage.read_json(f"{bucket}/out/summary.json") == made
    assert storage.names(f"{bucket}/out") == ["centroids.parquet", "labels.parquet", "summary.json"]


def test_a_write_that_died_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "state.npz")
    storage.write_arrays(uri, {"x": np.arange(3)})
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        storage.write_arrays(uri, {"x": np.arange(9)})
    assert storage.read_arrays(uri)["x"].tolist() == [0, 1, 2]
    assert storage.names(str(tmp_path)) == ["state.npz"]
