"""Class retrieval at VGGSound's size, against sorting every query's cosines by numpy.lexsort.

Drawn embeddings of clips around their classes; CPU time, since the machine may be shared. The peer
ranks a part of the queries, one way, and is scaled to all of them, both ways. That both find the
same is shown on a part of the clips. Printed: seconds of both, ratio, largest difference.

    python benchmarks/class_retrieval.py --clips 15446 --classes 309
"""

import argparse
import time

import numpy as np
from numpy.typing import NDArray

from training.evaluation.retrieval import class_retrieval, unit_rows

_ROWS = 512
Vectors = NDArray[np.float32]


def peer(
    queries_NP: Vectors, gallery_NP: Vectors, labels_N: NDArray[np.int64], n_queries: int
) -> NDArray[np.float64]:
    """[2, queries]: whether the first clip of the gallery is of the query's class, and the average
    precision."""
    queries, gallery = unit_rows(queries_NP), unit_rows(gallery_NP)
    found = []
    for start in range(0, n_queries, _ROWS):
        rows = np.arange(start, min(start + _ROWS, n_queries))
        cosines = (queries[rows] @ gallery.T).round(6)
        cosines[np.arange(len(rows)), rows] = -np.inf
        same = labels_N[rows][:, None] == labels_N[None]
        same[np.arange(len(rows)), rows] = False
        order = np.lexsort((same, -cosines), axis=1)
        hits = np.take_along_axis(same, order, 1)
        precision = hits.cumsum(1) / np.arange(1, hits.shape[1] + 1)
        found.append([hits[:, 0], (precision * hits).sum(1) / hits.sum(1)])
    return np.concatenate(found, axis=1)


def drawn(n_clips: int, n_classes: int, width: int) -> tuple[Vectors, Vectors, NDArray[np.int64]]:
    """Audio, video and labels; classes overlap."""
    draws = np.random.default_rng(0)
    labels_N = np.arange(n_clips) % n_classes
    centres_CP = draws.normal(size=(n_classes, width))
    audio, video = (
        (centres_CP[labels_N] + 3 * draws.normal(size=(n_clips, width))).astype(np.float32)
        for _ in range(2)
    )
    return audio, video, labels_N


def apart(n_clips: int, n_classes: int, width: int) -> float:
    """Largest difference between both, of all values."""
    audio, video, labels_N = drawn(n_clips, n_classes, width)
    ours = class_retrieval(audio, video, labels_N)
    worst = 0.0
    for way, queries, gallery in (("a2v", audio, video), ("v2a", video, audio)):
        theirs = peer(queries, gallery, labels_N, n_clips).mean(1)
        for name, value in zip(("r1", "map"), theirs.tolist(), strict=True):
            worst = max(worst, abs(ours[f"{way}_class_{name}"] - value))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=15_446)
    parser.add_argument("--classes", type=int, default=309)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--peer-queries", type=int, default=1024)
    args = parser.parse_args()
    audio, video, labels_N = drawn(args.clips, args.classes, args.width)
    began = time.process_time()
    class_retrieval(audio, video, labels_N)
    ours = time.process_time() - began
    n_queries = min(args.peer_queries, args.clips)
    began = time.process_time()
    peer(audio, video, labels_N, n_queries)
    theirs = (time.process_time() - began) * 2 * args.clips / n_queries
    differ = apart(min(args.clips, 2000), min(args.classes, 40), args.width)
    print(f"ours {ours:.1f} s  peer {theirs:.1f} s  ratio {ours / theirs:.2f}  apart {differ:.1e}")


if __name__ == "__main__":
    main()
