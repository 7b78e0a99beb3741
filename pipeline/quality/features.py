"""FeatureSignals: what the stored features of one clip say of it, without its source.

Pure arrays: knows nothing of files or rules. Invariant: a signal is a number of the picture or the
sound alone, hardly moved by another codec, size or a shift in time.

Shapes: N frames, h x w pixels of a thumbnail, C x C cells, T fbank rows, M mels, S steps of 50 ms.
"""

from typing import NamedTuple

import numpy as np
import simplejpeg

PRINT_FRAMES = 8
"""Most frames that are looked at, evenly spread over the clip."""
PRINT_CELLS = 7
PICTURE_WIDTH = PRINT_CELLS**2 + 2
"""Bytes of one frame's print: mean luma of 7 x 7 cells, and two mean chromas."""
SOUND_BANDS = 8
STEP_ROWS = 5
"""fbank rows of 10 ms in one step of a sound print."""
_LEAST_PIXELS = 28
_MOTION_CELLS = 14
_BLACK_LEVEL = 16.0
# Pre-emphasised power of white noise at 0 dB full scale, summed over the mel bins: 512 FFT points x
# 150 (energy of the window) / 2.
_FULL_SCALE_POWER = 38400.0
_SILENT_DB = -65.0
_LOUDNESS_ROWS = 8


class FeatureSignals(NamedTuple):
    """Signals of RULES that stored features give, and the prints that duplicates are found by."""

    motion: float | None
    """Change of the cell (of 14 x 14) that changes most from one frame to the next, median over the
    clip, in levels of luma; at least a 16th of its range. Null with fewer than two frames."""
    border_frac: float
    """Share of the height or width that black bars on both sides take."""
    silent_frac: float
    """Share of the fbank rows below -65 dB."""
    picture: bytes
    """uint8 [at most 8, 51]."""
    times_ms: list[int]
    """When the frames of `picture` are shown."""
    sound: bytes
    """uint8 [S, 8]: mean log-mel of 8 bands, in tenths of a neper above -16."""


def measure_features(
    jpegs: list[bytes], times_ms: list[int], fbank_TM: np.ndarray, n_valid: int
) -> FeatureSignals:
    """Args: fbank_TM: float16, of which the first n_valid rows are sound.

    Raises: ValueError if a payload is not a JPEG.
    """
    kept = np.unique(np.linspace(0, len(jpegs) - 1, PRINT_FRAMES).round().astype(int))
    # The scaled DCT of libjpeg gives a thumbnail at a fifth of a full decode's time.
    thumbs_NhwC = np.stack(
        [
            simplejpeg.decode_jpeg(
                jpegs[i],
                colorspace="RGB",
                min_height=_LEAST_PIXELS,
                min_width=_LEAST_PIXELS,
                min_factor=1,
            )
            for i in kept
        ]
    ).astype(np.float32)
    luma_Nhw = thumbs_NhwC @ np.array([0.299, 0.587, 0.114], np.float32)
    valid_tM = fbank_TM[:n_valid]
    return FeatureSignals(
        _motion(luma_Nhw) if len(jpegs) > 1 else None,
        _border_frac(luma_Nhw),
        _silent_frac(valid_tM),
        _picture_print(thumbs_NhwC, luma_Nhw).tobytes(),
        [times_ms[i] for i in kept],
        _sound_print(valid_tM).tobytes(),
    )


def _cells(images_Nhw: np.ndarray, n: int) -> np.ndarray:
    """Means over n x n cells, [N, n, n]."""
    for axis in (1, 2):
        edges = np.linspace(0, images_Nhw.shape[axis], n + 1).astype(int)
        sums = np.add.reduceat(images_Nhw, edges[:-1], axis=axis)
        shape = [1, 1, 1]
        shape[axis] = n
        images_Nhw = sums / np.diff(edges).reshape(shape)
    return images_Nhw


def _motion(luma_Nhw: np.ndarray) -> float:
    # H.264 lets a still drift between key frames, at CRF 40 by up to 8 levels, but its median step
    # stays below 0.5; the faintest of 4,800 moving digits makes 0.9. The range catches slide shows.
    cells_NCC = _cells(luma_Nhw, _MOTION_CELLS)
    step = float(np.median(np.abs(np.diff(cells_NCC, axis=0)).max((1, 2))))
    return max(step, float(np.ptp(cells_NCC, axis=0).max()) / 16)


def _border_frac(luma_Nhw: np.ndarray) -> float:
    """Bars count as wide as the narrower of both sides: a dark sky has no twin below."""
    brightest_hw = luma_Nhw.max(0)
    fracs = []
    for axis in (1, 0):
        bright = np.flatnonzero(brightest_hw.max(axis) > _BLACK_LEVEL)
        if len(bright) == 0:
            return 0.0  # All black: no picture that bars could stand beside.
        length = brightest_hw.shape[1 - axis]
        fracs.append(2 * min(bright[0], length - 1 - bright[-1]) / length)
    return float(max(fracs))


def _silent_frac(valid_tM: np.ndarray) -> float:
    some_tM = valid_tM[::_LOUDNESS_ROWS].astype(np.float32)
    if len(some_tM) == 0:
        return 1.0
    level_db = 10 * np.log10(np.exp(some_tM).sum(1) / _FULL_SCALE_POWER)
    return float((level_db < _SILENT_DB).mean())


def _picture_print(thumbs_NhwC: np.ndarray, luma_Nhw: np.ndarray) -> np.ndarray:
    cells_NC = _cells(luma_Nhw, PRINT_CELLS).reshape(len(luma_Nhw), -1)
    mean_N3 = thumbs_NhwC.mean((1, 2))
    chroma_N2 = 0.5 * (mean_N3[:, [0, 2]] - luma_Nhw.mean((1, 2))[:, None]) + 128
    return np.concatenate([cells_NC, chroma_N2], axis=1).round().clip(0, 255).astype(np.uint8)


def _sound_print(valid_tM: np.ndarray) -> np.ndarray:
    n_steps = len(valid_tM) // STEP_ROWS
    rows_tM = valid_tM[: n_steps * STEP_ROWS].astype(np.float32)
    steps_SM = rows_tM.reshape(n_steps, STEP_ROWS, -1).mean(1)
    edges = np.linspace(0, steps_SM.shape[1], SOUND_BANDS + 1).astype(int)
    bands_SB = np.add.reduceat(steps_SM, edges[:-1], axis=1) / np.diff(edges)
    return ((bands_SB + 16) * 10).round().clip(0, 255).astype(np.uint8)
