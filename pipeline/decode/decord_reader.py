"""Frames by decord, for clean timelines only.

Knows nothing of times: it is asked for ranks in order of presentation. Invariant: images are
returned only if decord and the FFmpeg inside it had nothing to complain of; otherwise None, and
the caller decodes another way.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from decord import DECORDError, VideoReader, cpu, logging

from pipeline.config import FeatureSpec
from pipeline.decode.frames import centre_square, pixel_aspect, scaled_size
from pipeline.decode.timeline import Timeline

logging.set_level(logging.ERROR)


def decode_with_decord(
    path: str, timeline: Timeline, ranks_N: np.ndarray, spec: FeatureSpec
) -> list[np.ndarray] | None:
    """The frames of these ranks as RGB squares, or None if decord cannot be trusted with the file.

    decord drops damaged frames without a word, which shifts all later ranks; only what its FFmpeg
    writes to stderr tells. It also reads ahead in a thread of its own, so the reader lives no
    longer than this call (dmlc/decord issues 157, 363).
    """
    stream = timeline.video.stream
    width, height = scaled_size(stream.width, stream.height, pixel_aspect(stream), spec)
    wanted, inverse_N = np.unique(ranks_N, return_inverse=True)
    with _native_stderr() as complaints:
        try:
            reader = VideoReader(path, ctx=cpu(0), width=width, height=height, num_threads=1)
            if len(reader) != len(timeline.video.pts):
                return None
            images = reader.get_batch(wanted).asnumpy()
            del reader
        except (DECORDError, RuntimeError):
            return None
        if complaints.seek(0, os.SEEK_END):
            return None
    return [centre_square(images[i], spec.frame_size) for i in inverse_N]


@contextmanager
def _native_stderr() -> Iterator[BinaryIO]:
    """What native code writes to file descriptor 2 meanwhile goes to the file yielded."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)
