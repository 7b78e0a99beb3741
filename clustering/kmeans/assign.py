"""assign: the nearest centroid of each row, the one expensive step of k-means.

Knows nothing of where rows lie. Invariant: calls on the same rows with the same centroids give the
same labels on one kind of hardware, because blocks have a fixed size and BLAS runs on one thread;
ties go to the lowest index.

Shapes: N rows, D width, K clusters.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import threadpoolctl


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController().select(internal_api="openblas")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """numpy's matrix products run on one thread inside: the split over threads changes bits."""
    with _blas().limit(limits=1):
        yield


def scores_by_block(
    x_ND: np.ndarray, centroids_KD: np.ndarray, offset_K: np.ndarray | None, block_rows: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (start, scores float32 [block, K]) with scores = x c' + offset.

    The array is reused: it is valid until the next one is asked for.
    """
    buffer = np.empty((min(block_rows, max(len(x_ND), 1)), len(centroids_KD)), dtype=np.float32)
    for start in range(0, len(x_ND), block_rows):
        block = x_ND[start : start + block_rows]
        scores = np.matmul(block, centroids_KD.T, out=buffer[: len(block)])
        if offset_K is not None:
            scores += offset_K
        yield start, scores


def assign(
    x_ND: np.ndarray, centroids_KD: np.ndarray, offset_K: np.ndarray | None, block_rows: int
) -> np.ndarray:
    """Label of the greatest x c' + offset, int32 [N], on the CPU.

    The offset is -|c|^2 / 2 for Euclidean distance and the balancing term for spherical.
    """
    labels = np.empty(len(x_ND), dtype=np.int32)
    for start, scores in scores_by_block(x_ND, centroids_KD, offset_K, block_rows):
        labels[start : start + len(scores)] = scores.argmax(axis=1)
    return labels


def assign_cuda(
    x_ND: np.ndarray, centroids_KD: np.ndarray, offset_K: np.ndarray | None
) -> np.ndarray:
    """As `assign`, by a flat faiss index on the first visible GPU.

    The offset is one more coordinate of the centroids, against ones in the rows.
    """
    rows, centroids = x_ND, centroids_KD
    if offset_K is not None:
        rows = np.concatenate([rows, np.ones((len(rows), 1), dtype=np.float32)], axis=1)
        centroids = np.concatenate([centroids, offset_K[:, None]], axis=1)
    index = _cuda_index(centroids.shape[1])
    index.reset()
    index.add(np.ascontiguousarray(centroids))
    return np.asarray(index.search(np.ascontiguousarray(rows), 1)[1][:, 0], dtype=np.int32)


@functools.cache
def _cuda_index(width: int) -> Any:
    import faiss

    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = False
    return faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), width, config)
