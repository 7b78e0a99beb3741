"""Rounds on an S3 API give the bits of rounds on a disk; local files appear whole."""

from dataclasses import replace
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.s3 import s3_server

from clustering import storage
from clustering.config import KMeansConfig, PoolConfig
from clustering.kmeans.checkpoint import LloydState, StateFile
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


def test_rounds_and_clusters_lie_where_a_name_has_two_colons(
    features, push_all, streams, round_digest, mixture, tmp_path: Path
) -> None:
    """fsspec takes them for a chain of places."""
    digests, made = [], []
    for name in ("plain", "C++::run"):
        uri = str(tmp_path / name / "rounds")
        rounds = LocalRounds(KMeansConfig(k=8), streams, uri)
        push_all(rounds, features(), 100)
        rounds.start(RoundRequest(1, 100, 120, posterior_temperature=0.1))
        rounds.wait(1, 120)
        rounds.save(f"{uri}/bank-1")
        rounds.restore(f"{uri}/bank-1")
        digests.append(round_digest(load_round(uri, 1)))
        vectors = tmp_path / name / "vectors.parquet"
        pq.write_table(pa.table({"embedding": mixture(n=600, k=4).x.tolist()}), vectors)
        out = str(tmp_path / name / "out")
        one = PoolConfig(n_actors=1)
        found = cluster_vectors(
            str(vectors), out, KMeansConfig(k=4), one, seed=0, column="embedding"
        )
        made.append(found["digest"])
    assert digests[0] == digests[1]
    assert made[0] == made[1]
    assert (tmp_path / "C++::run" / "rounds" / "round-0001" / "labels.parquet").exists()


def test_a_round_that_cannot_be_cleared_away_is_not_taken_for_the_one_asked_for(
    features, push_all, streams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in (8, 6):
        rounds = LocalRounds(KMeansConfig(k=k), streams, str(tmp_path))
        push_all(rounds, features(), 100)
        if k == 8:
            rounds.start(RoundRequest(1, 100, 120, posterior_temperature=0.1))
            rounds.wait(1, 120)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("os.unlink", refuse)
    with pytest.raises(PermissionError, match="not yours"):
        rounds.start(RoundRequest(1, 100, 120, posterior_temperature=0.1))


def test_a_write_that_failed_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = StateFile(str(tmp_path / "state.npz"))
    state = LloydState(np.zeros((2, 3), np.float32), limit=20)
    file.save(state)

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space left"):
            file.save(replace(state, done=True))
    assert not file.load().done
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]
