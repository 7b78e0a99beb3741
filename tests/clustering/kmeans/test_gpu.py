"""Assignment by faiss on a GPU finds the same centroids as the CPU."""

import faiss
import numpy as np
import pytest

from clustering.config import KMeansConfig
from clustering.kmeans.assign import assign, assign_cuda
from clustering.kmeans.lloyd import kmeans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs a CUDA device"),
]


@pytest.mark.parametrize("with_offset", [False, True])
def test_labels_are_those_of_the_cpu(mixture, with_offset: bool) -> None:
    data = mixture(n=20_000, k=100, width=128, noise=1.5)
    offset = np.linspace(-0.1, 0.1, 100).astype(np.float32) if with_offset else None
    cpu = assign(data.x, data.centers, offset, 1024)
    assert (assign_cuda(data.x, data.centers, offset) == cpu).mean() >= 0.9999


def test_clustering_is_that_of_the_cpu(mixture) -> None:
    data = mixture(n=5000, k=20)
    start = data.x[:20]
    cpu = kmeans(data.x, KMeansConfig(k=20, iterations=5, tol=0), init_KD=start)
    config = KMeansConfig(k=20, iterations=5, tol=0, device="cuda")
    gpu = kmeans(data.x, config, init_KD=start)
    assert (gpu.labels_N == cpu.labels_N).mean() >= 0.9999
    assert np.abs(gpu.centroids_KD - cpu.centroids_KD).max() <= 1e-5
