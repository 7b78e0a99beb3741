"""The sound of a clip's window as one mono waveform.

Knows nothing of pictures or mel bins; runs in the decode child and imports no torch.
Invariant: sample k sounds at window time k / rate, to a sample: edit lists, codec priming, late
starts and gaps are honoured, silence fills what has no sound.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from pipeline.config import FeatureSpec
from pipeline.decode.timeline import Timeline
from pipeline.passing import OF_PROCESS
from pipeline.reasons import Reason, Rejected

# Times of frames are rounded to the container's clock (1 ms in Matroska): a smaller gap is none.
_GAP_S = 0.04
_SHORT_FRAC = 0.9
# In bytes from within a frame, one in some ten pieces decodes, as noise; hardly three in a row.
_IN_STEP_FRAMES = 3
_SILENT_RMS = 1e-5


@dataclass
class Sound:
    """A waveform that ends where the sound ends."""

    waveform: np.ndarray
    """float32, at spec.sample_rate_hz, from the start of the window."""
    seconds: float
    """How much of it was decoded (not filled with silence)."""
    is_silent: bool


def decode_sound(timeline: Timeline, spec: FeatureSpec) -> Sound:
    """The waveform of the window, channels reduced as spec says.

    Raises: Rejected (audio_decode, audio_short; worker_died without memory).
    """
    rate = spec.sample_rate_hz
    waveform = np.zeros(round((timeline.end_s - timeline.start_s) * rate), np.float32)
    n_covered, end = 0, 0
    try:
        for begin_s, pieces in _runs(timeline):
            samples = _resample(pieces, spec)
            begin = round(begin_s * rate)
            first, last = max(begin, 0), min(begin + len(samples), len(waveform))
            if last > first:
                waveform[first:last] = samples[first - begin : last - begin]
                n_covered += last - first
                end = max(end, last)
    except av.FFmpegError as error:
        # The packets are in memory: no disk is asked for them.
        reason = Reason.WORKER_DIED if error.errno in OF_PROCESS else Reason.AUDIO_DECODE
        raise Rejected(reason, f"after {n_covered / rate:.2f} s: {error.strerror}") from error
    seconds = n_covered / rate
    _refuse_short(timeline, seconds, end / rate, spec)
    waveform = waveform[:end]
    rms = float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
    if not np.isfinite(rms):
        raise Rejected(Reason.AUDIO_DECODE, "the sound has samples that are not finite")
    return Sound(waveform, seconds, rms < _SILENT_RMS)


def _refuse_short(timeline: Timeline, seconds: float, end_s: float, spec: FeatureSpec) -> None:
    """Compare what was decoded with what the header and the packets promise."""
    if seconds < spec.min_audio_s:
        told = f"{seconds:.3f} s of sound in the window"
        ends_at_s = timeline.audio.end_s() - timeline.origin_s
        if ends_at_s <= timeline.start_s:
            told = (
                f"the window begins at {timeline.start_s:g} s, the sound ends at {ends_at_s:.2f} s"
            )
        raise Rejected(Reason.AUDIO_SHORT, told)
    length_s = timeline.end_s - timeline.start_s
    declared_s = timeline.audio.declared_end_s()
    if declared_s is not None:
        declared_s = min(declared_s - timeline.window_origin_s, length_s)
        if end_s < _SHORT_FRAC * declared_s:
            raise Rejected(
                Reason.AUDIO_SHORT,
                f"the sound ends at {end_s:.2f} s, the header promises {declared_s:.2f} s",
            )
    promised_s = timeline.audio.seconds_between(
        timeline.window_origin_s, timeline.window_origin_s + length_s
    )
    if seconds < _SHORT_FRAC * promised_s:
        raise Rejected(
            Reason.AUDIO_SHORT,
            f"{seconds:.2f} s of sound decode, the packets promise {promised_s:.2f} s",
        )


def _runs(timeline: Timeline) -> Iterator[tuple[float, list[Any]]]:
    """Decoded frames without gaps between them, with the window time of the first one."""
    run: list[Any] = []
    begin_s = next_s = 0.0
    settles = timeline.audio.stream.container.format.name == "mpeg"
    for frame in _frames(timeline):
        time_s = next_s
        if frame.pts is not None:
            time_s = frame.pts * timeline.audio.tick_s - timeline.window_origin_s
        same = run and (frame.sample_rate, frame.layout.name, frame.format.name) == (
            run[0].sample_rate,
            run[0].layout.name,
            run[0].format.name,
        )
        length_s = frame.samples / frame.sample_rate
        # A seek in MPEG-PS ends before a packet that begins with the rest of a frame. The rest gets
        # the packet's time, which is the next frame's: up to the packet after it all are off by a
        # frame or two, less than a gap. It lies before the window, where a new run costs nothing.
        least_s = length_s / 2 if settles and time_s < 0 else _GAP_S
        if run and (not same or abs(time_s - next_s) > least_s):
            yield begin_s, run
            run = []
        if not run:
            begin_s = next_s = time_s
        run.append(frame)
        next_s += length_s
    if run:
        yield begin_s, run


def _frames(timeline: Timeline) -> Iterator[Any]:
    """Decoded frames of the packets that begin before the window ends.

    Raises: av.FFmpegError from a packet after the first frames, or if there are no frames.
    Before them, packets are pieces of what was cut off: a seek in MPEG-PS ends within a frame, and
    the search for the next one stops at what looks like its head, of which some even decode. Damage
    there is left to the comparison with what the packets promise.
    """
    context = timeline.audio.stream.codec_context
    context.thread_count = 1
    tick_s = timeline.audio.tick_s
    end_s = timeline.origin_s + timeline.end_s
    packets = [p for p in timeline.audio.packets if p.pts is None or p.pts * tick_s < end_s]
    n_frames = 0
    waiting: list[Any] = []
    failure: av.FFmpegError | None = None
    for packet in (*packets, None):
        try:
            waiting += context.decode(packet)
        except av.FFmpegError as error:
            if n_frames:
                raise
            failure = error
            waiting.clear()
            continue
        if n_frames or len(waiting) >= _IN_STEP_FRAMES or packet is None:
            n_frames += len(waiting)
            yield from waiting
            waiting = []
    if failure is not None and n_frames == 0:
        raise failure


def _resample(frames: list[Any], spec: FeatureSpec) -> np.ndarray:
    """Frames of one format to float32 mono at the spec's rate."""
    # As one long frame: a codec's own have some 20 ms, and each costs more than its samples.
    fifo = av.AudioFifo()
    for frame in frames:
        frame.pts = None
        fifo.write(frame)
    # Interleaved: PyAV takes planes until a null pointer, and after eight of them there is none,
    # so that planar sound of eight channels (7.1) ended the process.
    resampler = av.AudioResampler(format="flt", rate=spec.sample_rate_hz)
    resampled = [*resampler.resample(fifo.read()), *resampler.resample(None)]
    interleaved = np.concatenate([frame.to_ndarray() for frame in resampled], axis=1)
    # A copy by channels, which the mean adds up in their order: the bits of a store depend on it.
    samples_CT = np.ascontiguousarray(interleaved.reshape(-1, resampled[0].layout.nb_channels).T)
    return np.asarray(samples_CT[0] if spec.audio_channel == "first" else samples_CT.mean(0))
