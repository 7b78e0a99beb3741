"""A log-mel fbank as a picture, and what its two axes are.

Pure arrays. Knows nothing of stores or HTML. Invariant: time runs to the right and tones rise to
the top, mel bin by mel bin, so that equal steps upwards are equal steps in mel, not in Hz.

Shapes: T valid fbank frames, M mel bins.
"""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.config import FRAME_SHIFT_MS, FeatureSpec

LOW_HZ = 20.0
"""Where Kaldi's lowest mel bin begins; the highest ends at half the sample rate."""
_INK = np.array([[13, 8, 34], [87, 21, 109], [187, 55, 84], [249, 142, 9], [252, 253, 191]], float)
"""Five colours from silence to loud, even in lightness."""


def colours(fbank_TM: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Log-mel levels between their 2nd and 99th percentile as uint8 [M, T, 3], mel 0 last."""
    low, high = np.percentile(fbank_TM, [2, 99])
    level_MT = np.clip((fbank_TM.T[::-1] - low) / max(high - low, 1e-6), 0, 1)
    stops = np.linspace(0, 1, len(_INK))
    channels = [np.interp(level_MT, stops, _INK[:, c]) for c in range(3)]
    return np.ascontiguousarray(np.stack(channels, axis=-1).astype(np.uint8))


def spectrogram_jpeg(
    fbank_TM: NDArray[np.floating], width: int = 250, height: int = 64, quality: int = 75
) -> bytes:
    """The valid rows of an fbank as a small JPEG, at most `width` x `height` pixels."""
    small_TM = _mean_of_equal_parts(fbank_TM.astype(np.float32), width)
    small_TM = _mean_of_equal_parts(small_TM.T, height).T
    return bytes(simplejpeg.encode_jpeg(colours(small_TM), quality=quality))


def _mean_of_equal_parts(rows: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    """At most `most` rows, each the mean of as many neighbours as the others, give or take one."""
    if len(rows) <= most:
        return rows
    starts = np.arange(most) * len(rows) // most
    counts = np.diff(np.append(starts, len(rows)))
    return np.asarray(np.add.reduceat(rows, starts, axis=0) / counts[:, None], np.float32)


def axes_in_words(spec: FeatureSpec) -> str:
    """What the axes of a spectrogram mean, for a reader of the page."""
    seconds = min(spec.duration_s, spec.fbank_frames * FRAME_SHIFT_MS / 1000)
    return (
        f"time from left to right (up to {seconds:g} s), frequency from bottom to top "
        f"({LOW_HZ:g} Hz to {spec.sample_rate_hz / 2000:g} kHz, mel scale)"
    )


def heights_of_hz(spec: FeatureSpec, marks_hz: tuple[float, ...]) -> list[tuple[float, float]]:
    """Marks of a frequency axis: (Hz, height from 0 at the bottom to 1), those outside left out."""
    low, high = mel(LOW_HZ), mel(spec.sample_rate_hz / 2)
    found = [(hz, (mel(hz) - low) / (high - low)) for hz in marks_hz]
    return [(hz, height) for hz, height in found if 0 <= height <= 1]


def mel(hz: float) -> float:
    """Kaldi's mel scale."""
    return 1127.0 * float(np.log1p(hz / 700.0))
