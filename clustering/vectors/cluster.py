"""cluster_vectors: k-means over any Parquet of vectors, from files to files.

Knows nothing of clips or training. Invariant: labels, centroids and digest are the same for any
number of actors, and for a run that was killed and started again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clustering import storage
from clustering.config import KMeansConfig, PoolConfig
from clustering.errors import BadVectors, ClusteringError
from clustering.kmeans.checkpoint import StateFile
from clustering.kmeans.lloyd import Clustering, cluster
from clustering.kmeans.passes import LocalPasses, Passes
from clustering.kmeans.share import Share
from clustering.kmeans.space import whole_rows
from clustering.vectors.source import VectorFile, VectorSource, find_files, shares_of, width_of
from pipeline.patience import open_filesystem

_ID_NAMES = ("id", "clip_id", "key")
_STAMPS = ("mtime", "ETag", "etag", "LastModified", "updated", "created")
"""Of a listing's entry, the first that is there tells a file from another one of its name and size:
disks have the time, object stores a tag of the content."""


def cluster_vectors(
    vectors_uri: str,
    out: str,
    kmeans: KMeansConfig,
    pool: PoolConfig,
    *,
    seed: int,
    column: str,
    id_column: str | None = None,
    start_ray: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Cluster the vectors of a Parquet file or folder and write the result under `out`.

    Writes labels.parquet (id, label, distance: Euclidean, or 1 - cosine when spherical),
    centroids.parquet (cluster, count, centroid) and summary.json. The id is `id_column`, or the
    first of id, clip_id, key, or the row's number. One actor means this process, without Ray;
    otherwise `start_ray` is called first (None: Ray is already up).
    Returns: the summary {"inertia", "iterations", "counts", "digest", "seconds"}.
    Raises: BadVectors, naming file and row; ClusteringError.
    """
    started = time.perf_counter()
    files = find_files(vectors_uri)
    width = width_of(files, column)
    ids = _read_ids(files, id_column)
    token = _token(files, column)
    shares = enumerate(shares_of(files, pool.n_actors))
    sources = [VectorSource(f"{token}-{i}", pieces, column, width) for i, pieces in shares]
    state = storage.join(out, f"state-{_fingerprint(token, kmeans, seed)}.npz")
    with _passes(sources, kmeans, pool, start_ray) as passes:
        try:
            space = whole_rows(width, kmeans.spherical)
            made = cluster(passes, space, kmeans, seed, checkpoint=StateFile(state))
        except BadVectors as error:
            raise _with_place(error, files, ids) from None
    summary = _summary(made, time.perf_counter() - started)
    _write(out, made, ids, summary)
    storage.remove(state)
    return summary


@contextmanager
def _passes(
    sources: list[VectorSource],
    kmeans: KMeansConfig,
    pool: PoolConfig,
    start_ray: Callable[[], None] | None,
) -> Iterator[Passes]:
    if len(sources) == 1:
        yield LocalPasses(Share(sources[0], kmeans.block_rows, kmeans.device))
        return
    if start_ray is not None:
        start_ray()
    # Here, so that one actor needs no Ray, which takes seconds to import.
    from clustering.pool.compute import RayPasses, compute_actors, stop

    actors = compute_actors(kmeans, pool.groups(kmeans).compute)
    try:
        yield RayPasses(actors, sources, pool.reducer, pool.fan_in)
    finally:
        stop(actors)


def _read_ids(files: list[VectorFile], id_column: str | None) -> pa.ChunkedArray | None:
    """Ids of all rows in order, or None: number the rows. Raises: BadVectors for duplicates, or
    columns that are not of one type."""
    shared = set.intersection(*(set(file.columns) for file in files))
    name = id_column or next((known for known in _ID_NAMES if known in shared), None)
    if name is None:
        return None
    if name not in shared:
        raise BadVectors(f"no column {name!r} in every file; they share {sorted(shared)}.")
    ids = _column(files, name)
    if ids.null_count or pc.count_distinct(ids).as_py() != len(ids):
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        raise BadVectors(
            f"column {name!r} is no id: {ids.null_count} nulls, {len(twice)} values occur more "
            f"than once: {twice[:5].to_pylist()}. Name an id column, or leave it out of the file."
        )
    return ids


def _column(files: list[VectorFile], name: str) -> pa.ChunkedArray:
    """A column of all files in order; categories, as pandas writes them, as what they stand for."""
    parts = []
    for file in files:
        with storage.opened(file.uri) as handle:
            part = pq.read_table(handle, columns=[name])
        if pa.types.is_dictionary(part[name].type):
            part = part.set_column(0, name, part[name].cast(part[name].type.value_type))
        parts.append(part)
    try:
        return pa.concat_tables(parts, promote_options="permissive")[name]
    except pa.ArrowException as error:
        kinds = sorted(
            {f"{part[name].type} in {f.uri}" for part, f in zip(parts, files, strict=True)}
        )
        raise BadVectors(
            f"column {name!r} is not of one type ({', '.join(kinds[:3])}). Write it as one type in "
            "every file, or name another id column."
        ) from error


def _token(files: list[VectorFile], column: str) -> str:
    """Name of the input's content, as far as the listing tells."""
    facts: list[Any] = [column]
    for file in files:
        filesystem, path = open_filesystem(file.uri)
        info = filesystem.info(path)
        stamp = next((str(info[name]) for name in _STAMPS if info.get(name)), "")
        facts.append([file.uri, file.group_rows, info["size"], stamp])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _fingerprint(token: str, kmeans: KMeansConfig, seed: int) -> str:
    facts = json.dumps([token, kmeans.model_dump(mode="json"), seed], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _with_place(
    error: BadVectors, files: list[VectorFile], ids: pa.ChunkedArray | None
) -> BadVectors:
    """The same error with file, row and id of the first bad row, where its key is known."""
    if not error.keys:
        return error
    row = error.keys[0]
    first = 0
    for file in files:
        if row < first + file.n_rows:
            known = "" if ids is None else f", id {ids[row].as_py()!r}"
            return BadVectors(f"{file.uri}, row {row - first}{known}: {error}")
        first += file.n_rows
    raise ClusteringError(f"row {row} of {first}: {error}")


def _summary(made: Clustering, seconds: float) -> dict[str, Any]:
    return {
        "inertia": made.inertia,
        "iterations": made.iterations,
        "counts": made.counts_K.tolist(),
        "digest": made.digest,
        "seconds": round(seconds, 3),
    }


def _write(
    out: str, made: Clustering, ids: pa.ChunkedArray | None, summary: dict[str, Any]
) -> None:
    labels = pa.table(
        {
            "id": pa.array(made.keys_N) if ids is None else ids,
            "label": pa.array(made.labels_N),
            "distance": pa.array(made.distances_N),
        }
    )
    k, width = made.centroids_KD.shape
    flat = pa.array(made.centroids_KD.reshape(-1))
    centroids = pa.table(
        {
            "cluster": pa.array(np.arange(k, dtype=np.int32)),
            "count": pa.array(made.counts_K),
            "centroid": pa.FixedSizeListArray.from_arrays(flat, width),
        }
    )
    for name, table in (("labels", labels), ("centroids", centroids)):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        storage.write_bytes(storage.join(out, f"{name}.parquet"), memoryview(sink.getvalue()))
    storage.write_json(storage.join(out, "summary.json"), summary)
