"""What the decode child does with one clip: container to JPEGs, times and waveform.

Knows nothing of Ray, fbank or the store; imports no torch, so that a child starts in half a second.
Invariant: returns a Clip or raises Rejected; a damaged file is never another exception.
"""

from dataclasses import dataclass

import av
import numpy as np

from pipeline.config import FeatureSpec
from pipeline.decode.frames import FLAG_SILENT, decode_frames
from pipeline.decode.payload import encode_jpeg
from pipeline.decode.sound import decode_sound
from pipeline.decode.timeline import read_timeline
from pipeline.passing import OF_PROCESS, OF_STORAGE
from pipeline.reasons import Reason, Rejected

_TRIES = 2
_BLOCK_BYTES = 1 << 20


@dataclass
class Clip:
    """One clip's features but for the fbank, which is made from the waveform outside."""

    frames: list[bytes]
    frame_ts_ms: list[int]
    waveform: np.ndarray
    audio_s: float
    video_s: float
    width: int
    height: int
    fps: float
    codec: str
    decoder: str
    flags: int
    file_s: float = 0.0
    """How long its container says that the whole file lasts; 0 if it does not say."""


def extract(path: str, start_s: float | None, end_s: float | None, spec: FeatureSpec) -> Clip:
    """Decode the clip in [start_s, end_s) of a local file; None means its whole.

    A mount that fails once costs a second try; `io_error` is of a file that cannot be read, and
    `worker_died` of a process that has no memory or handles left.

    Raises: Rejected.
    """
    for _ in range(_TRIES):
        try:
            return _decode(path, start_s, end_s, spec)
        except av.FFmpegError as error:
            told, failure = error.strerror or str(error), error
        if failure.errno not in OF_STORAGE:
            break
        # FFmpeg says so of a file that ends too soon, too.
        _refuse_unreadable(path)
    reason = Reason.WORKER_DIED if failure.errno in OF_PROCESS else Reason.OPEN_FAILED
    raise Rejected(reason, told) from failure


def _refuse_unreadable(path: str) -> None:
    """Raises: Rejected if not all bytes of the file can be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            while file.read(_BLOCK_BYTES):
                pass
    except OSError as error:
        raise Rejected(Reason.IO_ERROR, error.strerror or str(error)) from error


def _decode(path: str, start_s: float | None, end_s: float | None, spec: FeatureSpec) -> Clip:
    """Raises: Rejected; av.FFmpegError of the file or its container."""
    duration_s = spec.duration_s
    if end_s is not None:
        duration_s = min(duration_s, end_s - (start_s or 0.0))
    with av.open(path, metadata_errors="replace") as container:
        is_window = start_s is not None or end_s is not None
        container_s = (container.duration or 0) / av.time_base
        if not is_window and container_s > spec.max_clip_s:
            raise Rejected(
                Reason.TOO_LONG,
                f"the file lasts {container_s:.0f} s, more than {spec.max_clip_s:.0f} s",
            )
        timeline = read_timeline(container, start_s or 0.0, duration_s)
        sound = decode_sound(timeline, spec)
        frames = decode_frames(path, timeline, spec)
    unique = {id(image): encode_jpeg(image, spec.jpeg_quality) for image in frames.images_NHW3}
    return Clip(
        [unique[id(image)] for image in frames.images_NHW3],
        [round(1000 * time_s) for time_s in frames.times_s],
        sound.waveform,
        sound.seconds,
        frames.seconds,
        frames.width,
        frames.height,
        frames.fps,
        frames.codec,
        frames.decoder,
        frames.flags | (FLAG_SILENT if sound.is_silent else 0),
        container_s,
    )
