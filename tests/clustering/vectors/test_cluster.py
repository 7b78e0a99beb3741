"""`diccae cluster` over any Parquet of vectors: formats, results, errors, restarts."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clustering.config import KMeansConfig, PoolConfig
from clustering.errors import BadVectors, ClusteringError
from clustering.kmeans.checkpoint import StateFile
from clustering.kmeans.lloyd import kmeans
from clustering.rounds.health import nmi
from clustering.vectors.cluster import cluster_vectors
from clustering.vectors.source import VectorFile, shares_of

CONFIG = KMeansConfig()


def _list(x: np.ndarray, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(x.tolist(), type=kind or pa.list_(pa.float32()))


def _fixed_list(x: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])


def _binary(x: np.ndarray) -> pa.Array:
    width = x.shape[1] * x.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(x), [None, pa.py_buffer(np.ascontiguousarray(x))]
    )


def _write(
    path: Path, vectors: pa.Array, ids: list | None = None, metadata=None, rows=1000
) -> None:
    columns = {"embedding": vectors} if ids is None else {"id": pa.array(ids), "embedding": vectors}
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def _cluster(where: Path, out: Path, k: int = 12, n_actors: int = 1, seed: int = 0, **options):
    config = options.pop("config", CONFIG).model_copy(update={"k": k})
    pool = PoolConfig(n_actors=n_actors, cpus_per_actor=0.1)
    return cluster_vectors(
        str(where), str(out), config, pool, seed=seed, column="embedding", **options
    )


@pytest.fixture
def data(mixture):
    return mixture(n=2500, k=12, width=16, noise=0.6)


FORMATS = {
    "list<float>": lambda x: (_list(x), None),
    "large_list<double>": lambda x: (_list(x, pa.large_list(pa.float64())), None),
    "fixed_size_list": lambda x: (_fixed_list(x), None),
    "fixed_size_binary float32": lambda x: (_binary(x), {"dtype": "float32", "dim": "16"}),
}


def test_every_format_of_a_vector_gives_the_same_clustering(data, tmp_path: Path) -> None:
    digests = set()
    for name, make in FORMATS.items():
        column, metadata = make(data.x)
        _write(tmp_path / name / "v.parquet", column, metadata=metadata)
        digests.add(_cluster(tmp_path / name / "v.parquet", tmp_path / name / "out")["digest"])
    assert len(digests) == 1


def test_half_precision_binary_with_metadata_on_the_field(data, tmp_path: Path) -> None:
    half = data.x.astype(np.float16)
    field = pa.field("embedding", pa.binary(32), metadata={"dtype": "float16", "dim": "16"})
    table = pa.table([_binary(half)], schema=pa.schema([field]))
    pq.write_table(table, tmp_path / "v.parquet")
    made = _cluster(tmp_path / "v.parquet", tmp_path / "out")
    expected = kmeans(half.astype(np.float32), CONFIG.model_copy(update={"k": 12}))
    labels = pq.read_table(tmp_path / "out" / "labels.parquet")
    assert labels["label"].to_pylist() == expected.labels_N.tolist()
    assert made["inertia"] == expected.inertia


def test_results_on_storage_agree_with_each_other(data, tmp_path: Path) -> None:
    ids = [f"clip-{i}" for i in range(2500)]
    _write(tmp_path / "v.parquet", _list(5 * data.x), ids)
    made = _cluster(tmp_path / "v.parquet", tmp_path / "out")
    assert set(made) == {"inertia", "iterations", "counts", "digest", "seconds"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == made
    labels = pq.read_table(tmp_path / "out" / "labels.parquet")
    assert labels.column_names == ["id", "label", "distance"]
    assert labels["id"].to_pylist() == ids
    label = labels["label"].to_numpy()
    assert np.bincount(label, minlength=12).tolist() == made["counts"]
    assert nmi(label, data.truth) >= 0.95
    centroids = pq.read_table(tmp_path / "out" / "centroids.parquet")
    assert centroids.column_names == ["cluster", "count", "centroid"]
    c = np.array(centroids["centroid"].to_pylist())
    distance = 1 - (data.x * c[label]).sum(axis=1)
    np.testing.assert_allclose(labels["distance"].to_numpy(), distance, atol=1e-5)
    assert made["inertia"] == pytest.approx(2 * distance.sum(), rel=1e-4)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "centroids.parquet",
        "labels.parquet",
        "summary.json",
    ]


@pytest.mark.usefixtures("ray_session")
def test_actors_read_a_folder_with_an_empty_file_to_the_same_bits(mixture, tmp_path: Path) -> None:
    data = mixture(n=60_000, k=6, width=8)
    x = data.x + np.float32(9)
    folder = tmp_path / "vectors"
    for i, part in enumerate(np.array_split(x, 3)):
        _write(folder / f"part-{i}.parquet", _fixed_list(part), rows=[7000, 10**6, 10**6][i])
    _write(folder / "part-1-empty.parquet", _fixed_list(x[:0]))
    (folder / "_SUCCESS").write_text("")
    config = KMeansConfig(spherical=False, vshards=2)
    started = []
    made = [
        _cluster(
            folder,
            tmp_path / str(n),
            k=6,
            n_actors=n,
            config=config,
            seed=3,
            start_ray=lambda n=n: started.append(n),
        )
        for n in (1, 3)
    ]
    assert started == [3]
    assert len({m["digest"] for m in made}) == 1
    assert len({m["inertia"] for m in made}) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_cover_every_row_once_and_cut_at_blocks(count: int) -> None:
    files = [
        VectorFile("a", (40_000, 0, 100), ("v",)),
        VectorFile("b", (), ("v",)),
        VectorFile("c", (70_000,), ("v",)),
    ]
    shares = shares_of(files, count)
    pieces = [piece for share in shares for piece in share]
    keys = [piece.first_key + row for piece in pieces for row in range(piece.start, piece.stop)]
    assert keys == list(range(110_100))
    assert all(piece.start % 16384 == 0 for piece in pieces)
    rows = [sum(piece.stop - piece.start for piece in share) for share in shares]
    assert max(rows) - min(rows) <= 2 * 16384


def test_a_killed_run_goes_on_where_it_stopped(
    data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = KMeansConfig(init="random", tol=0)
    _write(tmp_path / "v.parquet", _fixed_list(data.x))
    expected = _cluster(tmp_path / "v.parquet", tmp_path / "a", config=config)
    saves = []
    save = StateFile.save

    def dying(self, state):
        save(self, state)
        saves.append(state)
        if len(saves) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            _cluster(tmp_path / "v.parquet", tmp_path / "b", config=config)
    resumed = []
    monkeypatch.setattr(StateFile, "save", lambda self, state: resumed.append(state))
    made = _cluster(tmp_path / "v.parquet", tmp_path / "b", config=config)
    assert len(resumed) == expected["iterations"] - 3
    assert made["digest"] == expected["digest"]


def test_an_integer_id_column_may_be_named(data, tmp_path: Path) -> None:
    table = pa.table({"row": np.arange(2500) * 3, "embedding": _list(data.x)})
    pq.write_table(table, tmp_path / "v.parquet")
    _cluster(tmp_path / "v.parquet", tmp_path / "out", id_column="row")
    labels = pq.read_table(tmp_path / "out" / "labels.parquet")
    assert labels["id"].to_pylist() == (np.arange(2500) * 3).tolist()


def _ragged(x: np.ndarray) -> pa.Array:
    rows = x.tolist()
    rows[1234] = rows[1234][:-1]
    return pa.array(rows, type=pa.list_(pa.float32()))


def _with_null(x: np.ndarray) -> pa.Array:
    rows = x.tolist()
    rows[5] = None
    return pa.array(rows, type=pa.list_(pa.float32()))


def _with_value(value: float):
    def make(x: np.ndarray) -> pa.Array:
        x = x.copy()
        x[1001] = value
        return _list(x)

    return make


BAD = {
    "ragged": (_ragged, r"v.parquet, row group 1, row 0 \+ 234: 15 values where 16 are expected"),
    "null": (_with_null, r"row 0 \+ 5: the vector is null"),
    "NaN": (_with_value(np.nan), r"v.parquet, row 1001, id 'c1001': vectors with NaN"),
    "zeros": (_with_value(0.0), r"v.parquet, row 1001, id 'c1001': vectors with only zeros"),
    "text": (lambda x: pa.array(["a"] * len(x)), "the column has type string; expected a list"),
    "bytes": (_binary, "needs metadata dtype and dim"),
    "words": (lambda x: pa.array([["a"]] * len(x)), "expected numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_vectors_are_named_by_file_and_row(data, tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    _write(tmp_path / "v.parquet", make(data.x), [f"c{i}" for i in range(2500)])
    with pytest.raises(BadVectors, match=message):
        _cluster(tmp_path / "v.parquet", tmp_path / "out")
    assert not (tmp_path / "out" / "labels.parquet").exists()


def test_files_of_different_widths_are_refused(data, tmp_path: Path) -> None:
    _write(tmp_path / "f" / "a.parquet", _fixed_list(data.x))
    _write(tmp_path / "f" / "b.parquet", _fixed_list(np.ascontiguousarray(data.x[:, :8])))
    with pytest.raises(BadVectors, match=r"b.parquet.*vectors of 8 values where 16 are expected"):
        _cluster(tmp_path / "f", tmp_path / "out")


def test_input_that_is_not_there_or_not_usable(data, tmp_path: Path) -> None:
    _write(tmp_path / "v.parquet", _list(data.x), [f"c{i % 2499}" for i in range(2500)])
    with pytest.raises(BadVectors, match=r"'id' is no id: 0 nulls, 1 values occur more.*'c0'"):
        _cluster(tmp_path / "v.parquet", tmp_path / "out")
    with pytest.raises(ClusteringError, match="no such file or folder"):
        _cluster(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClusteringError, match=r"no \*.parquet file"):
        _cluster(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ClusteringError, match="not a readable Parquet file"):
        _cluster(tmp_path / "broken.parquet", tmp_path / "out")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(BadVectors, match=r"no column 'embedding'; it has \['x'\]"):
        _cluster(tmp_path / "other.parquet", tmp_path / "out")
    _write(tmp_path / "none.parquet", _list(data.x[:0]))
    with pytest.raises(BadVectors, match="1 files hold no rows"):
        _cluster(tmp_path / "none.parquet", tmp_path / "out")
    _write(tmp_path / "few.parquet", _list(data.x[:5]))
    with pytest.raises(BadVectors, match="5 rows for k = 12 clusters"):
        _cluster(tmp_path / "few.parquet", tmp_path / "out")


def test_a_killed_run_does_not_go_on_with_other_vectors_put_in_their_place(
    mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store has no time of modification, and the files are of one size."""
    config = KMeansConfig(init="random", tol=0)
    remote = fsspec.filesystem("memory")
    files = []
    for seed in (1, 2):
        table = pa.table({"embedding": _fixed_list(mixture(n=600, k=12, width=8, seed=seed).x)})
        options = {"compression": "none", "use_dictionary": False}
        pq.write_table(table, tmp_path / f"{seed}.parquet", **options)
        files.append((tmp_path / f"{seed}.parquet").read_bytes())
    assert len(files[0]) == len(files[1])
    remote.pipe_file("/vectors/v.parquet", files[0])

    def dying(self, state):
        save(self, state)
        raise KeyboardInterrupt

    save = StateFile.save
    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            _cluster_remote("memory://vectors/v.parquet", config)
    remote.pipe_file("/vectors/v.parquet", files[1])
    made = _cluster_remote("memory://vectors/v.parquet", config)
    expected = _cluster(tmp_path / "2.parquet", tmp_path / "out", config=config)
    assert made["digest"] == expected["digest"]


def _cluster_remote(where: str, config: KMeansConfig) -> dict:
    pool = PoolConfig(n_actors=1, cpus_per_actor=0.1)
    config = config.model_copy(update={"k": 12})
    return cluster_vectors(where, "memory://clustered", config, pool, seed=0, column="embedding")


def test_ids_may_be_categories_and_files_may_name_their_type_otherwise(
    data, tmp_path: Path
) -> None:
    """As pandas and polars write one column."""
    names = [f"c{i:04d}" for i in range(2500)]
    kinds = (pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.string())
    folder = tmp_path / "v"
    for i, kind in enumerate(kinds):
        part = slice(1000 * i, 1000 * (i + 1))
        table = pa.table({"id": pa.array(names[part]).cast(kind), "embedding": _list(data.x[part])})
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / f"{i}.parquet")
    _cluster(folder, tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "labels.parquet")["id"].to_pylist() == names
    table = pa.table({"id": np.arange(5), "embedding": _list(data.x[:5])})
    pq.write_table(table, folder / "3.parquet")
    with pytest.raises(BadVectors, match=r"column 'id' is not of one type .*int64"):
        _cluster(folder, tmp_path / "out")
