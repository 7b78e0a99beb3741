"""A few seconds of sound as the smallest file that a browser plays: Opus in WebM.

Knows nothing of stores or pages. `excerpt` is run in the decode child (files may hang or crash a
decoder), so nothing here imports torch. Invariant: equal samples give equal bytes.
"""

import base64
import io
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.config import FeatureSpec
from pipeline.decode.sound import decode_sound
from pipeline.decode.timeline import read_timeline
from pipeline.reasons import Reason, Rejected

EXCERPT_S = 5.0
"""Enough to tell a class by ear; 16 kbit/s make 10 KB of it."""
EXCERPT_RATE_HZ = 24000
_BITS_PER_S = 16_000
_FADE_S = 0.02


class Sound(NamedTuple):
    """An excerpt to play, and whether it is what was recorded."""

    webm: bytes
    is_from_source: bool
    """False: synthesised from the stored fbank."""

    @property
    def uri(self) -> str:
        """A `data:` URI for an audio element."""
        return f"data:audio/webm;base64,{base64.b64encode(self.webm).decode()}"


def encode_sound(waveform: NDArray[np.float32], rate_hz: int) -> bytes:
    """Mono samples in [-1, 1] as WebM with Opus at 16 kbit/s, its end faded out.

    Args: rate_hz: 8000, 12000, 16000, 24000 or 48000 are Opus's own, others are resampled.
    """
    samples = np.clip(waveform, -1.0, 1.0).astype(np.float32)
    n_fade = min(len(samples), round(_FADE_S * rate_hz))
    samples[len(samples) - n_fade :] *= np.linspace(1, 0, n_fade, dtype=np.float32)
    file = io.BytesIO()
    # Bit-exact: else the muxer writes a random id, and no two pages of a run are equal.
    with av.open(file, "w", format="webm", options={"fflags": "+bitexact"}) as container:
        own = (8000, 12000, 16000, 24000, 48000)
        # Its effort of 10 takes twice the time of 3 for a difference nobody hears.
        options = {"compression_level": "3"}
        rate = rate_hz if rate_hz in own else 24000
        stream = container.add_stream("libopus", rate=rate, options=options)
        stream.layout, stream.bit_rate = "mono", _BITS_PER_S
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        for part in (frame, None):
            container.mux(stream.encode(part))
    return file.getvalue()


def excerpt(path: str, start_s: float | None, end_s: float | None) -> bytes:
    """The first seconds of a clip's own sound, ready to play.

    Args: start_s, end_s: the clip's window in the file; None: its start and its end.
    Raises: Rejected.
    """
    length_s = EXCERPT_S if end_s is None else min(EXCERPT_S, end_s - (start_s or 0.0))
    spec = FeatureSpec(sample_rate_hz=EXCERPT_RATE_HZ, duration_s=length_s, min_audio_s=0.1)
    try:
        with av.open(path, metadata_errors="replace") as container:
            timeline = read_timeline(container, start_s or 0.0, length_s)
            return encode_sound(decode_sound(timeline, spec).waveform, EXCERPT_RATE_HZ)
    except av.FFmpegError as error:
        raise Rejected(Reason.OPEN_FAILED, error.strerror or str(error)) from error
