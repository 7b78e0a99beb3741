"""probe_source: what only the source file of a clip can say, at a small part of a decode's cost.

Runs in the decode child; knows nothing of rules or the store. Invariant: no picture is decoded, and
of the sound a third of a second; a file that cannot be opened still tells how much of it is lost.

Shapes: C channels, S samples.
"""

from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.quality.filesize import lost_bytes_frac

_LISTEN_AT = (0.2, 0.5, 0.8)
"""Where in the clip its sound is listened to, as shares of its length."""
_LISTEN_S = 0.1
_FULL_SCALE = 0.98
_QUIETEST_DB = -100.0
# Headers round durations to a picture, or to a packet of sound.
_HEADER_SLACK_S = 0.25
# A seek to the end lands on the last key frame before it; in a cut file, before the cut. In FLV it
# may find nothing at all: there, and in what its index names of a part cut off.
_SEEKS_BACK_S = (0.0, 1.0, 5.0, 20.0)


class SourceSignals(NamedTuple):
    """Signals of RULES that the source file gives; None: it cannot be told."""

    clipped_frac: float | None = None
    """Share of samples at 0.98 of full scale or more."""
    channel_gap_db: float | None = None
    """Level of the louder of two channels over the other; 0 for mono."""
    edit_list_ms: float | None = None
    """How long the pictures last that a frame counter sees before the first one to be shown."""
    lost_frac: float | None = None
    """Share of the bytes or the time that the headers promise and the file does not hold."""
    problem: str = ""
    """Why the file could not be opened."""


def probe_source(path: str, start_s: float | None, duration_s: float) -> SourceSignals:
    """Look at the clip from start_s (None: the start) of a local file."""
    lost_frac = lost_bytes_frac(path)
    try:
        with av.open(path, metadata_errors="replace") as container:
            edit_list_ms = _edit_list_ms(container) if start_s is None else 0.0
            if not lost_frac:
                lost_frac = _lost_time_frac(container)
            clipped_frac, gap_db = _listen(container, start_s or 0.0, duration_s)
    except (av.FFmpegError, ValueError) as error:
        return SourceSignals(lost_frac=lost_frac, problem=f"{type(error).__name__}: {error}")
    return SourceSignals(clipped_frac, gap_db, edit_list_ms, lost_frac)


def _edit_list_ms(container: Any) -> float:
    """Only containers of the MP4 family have edit lists."""
    if not container.streams.video or "mp4" not in container.format.name:
        return 0.0
    video = container.streams.video[0]
    hidden: list[int] = []
    for packet in container.demux(video):
        if packet.pts is None:
            continue
        if not packet.is_discard and packet.pts >= 0:
            hidden_pts = [pts for pts in hidden if pts < packet.pts]
            if not hidden_pts:
                return 0.0
            return 1000 * float((packet.pts - min(hidden_pts)) * video.time_base)
        hidden.append(packet.pts)
    return 0.0


def _lost_time_frac(container: Any) -> float:
    """Of a container without an index of bytes: where its last packet is, against its header."""
    if "mp4" in container.format.name or not container.duration:
        return 0.0
    promised_s = float(container.duration / av.time_base)
    start_s = float((container.start_time or 0) / av.time_base)
    for back_s in (*_SEEKS_BACK_S, promised_s):
        at_s = start_s + max(0.0, promised_s - back_s)
        container.seek(int(at_s * av.time_base), backward=True)
        last_s = _end_of_packets_s(container)
        if last_s is not None:
            return max(0.0, promised_s - (last_s - start_s) - _HEADER_SLACK_S) / promised_s
    return 1.0


def _end_of_packets_s(container: Any) -> float | None:
    """When the last of the packets ends that are still to be read; None if there are none."""
    return max(
        (
            float((packet.pts + (packet.duration or 0)) * packet.time_base)
            for packet in container.demux()
            if packet.pts is not None and packet.size
        ),
        default=None,
    )


def _listen(container: Any, start_s: float, duration_s: float) -> tuple[float | None, float | None]:
    """clipped_frac and channel_gap_db of a few short pieces."""
    if not container.streams.audio:
        return None, None
    audio = container.streams.audio[0]
    audio.codec_context.thread_count = 1
    origin_s = (container.start_time or 0) / av.time_base
    whole_s = (container.duration or 0) / av.time_base - start_s
    length_s = min(duration_s, whole_s) if whole_s > 0 else duration_s
    pieces = [
        _piece(container, audio, origin_s + start_s + at * max(0.0, length_s - _LISTEN_S))
        for at in _LISTEN_AT
    ]
    samples = [piece_CS for piece_CS in pieces if piece_CS is not None]
    if not samples or len({len(piece_CS) for piece_CS in samples}) > 1:
        return None, None
    samples_CS = np.concatenate(samples, axis=1)
    clipped = float((np.abs(samples_CS) >= _FULL_SCALE).mean())
    rms_C = np.sqrt(np.square(samples_CS, dtype=np.float64).mean(1))
    level_C = np.maximum(20 * np.log10(np.maximum(rms_C, 1e-12)), _QUIETEST_DB)
    return clipped, float(np.ptp(level_C)) if len(level_C) == 2 else 0.0


def _piece(container: Any, audio: Any, at_s: float) -> np.ndarray | None:
    """A tenth of a second of sound from at_s on, float [C, S].

    The first frame is left out: it leans on one that was not read.
    """
    container.seek(int(at_s / audio.time_base), stream=audio, backward=True)
    audio.codec_context.flush_buffers()
    blocks, n_samples = [], 0
    for packet in container.demux(audio):
        try:
            frames = audio.codec_context.decode(packet)
        except av.FFmpegError:
            continue
        for frame in frames:
            blocks.append(_floats(frame))
            n_samples += frame.samples
        if len(blocks) > 1 and n_samples - blocks[0].shape[1] >= _LISTEN_S * (audio.rate or 0):
            break
    blocks = blocks[1:] if len(blocks) > 1 else blocks
    return np.concatenate(blocks, axis=1) if blocks else None


def _floats(frame: Any) -> np.ndarray:
    """Samples [C, S] between -1 and 1."""
    samples: NDArray[Any] = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        return np.asarray((samples.astype(np.float32) - 128) / 128)
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / float(np.iinfo(samples.dtype).max)
    return samples
