"""An fbank back to a waveform one can listen to, by Griffin and Lim's method.

Pure numpy and scipy; the torch that made the fbank is not needed. What the mel bins threw away
(phase, and the fine structure of the spectrum) is made up: it sounds like the clip through a tin,
so whoever plays it has to say where it comes from.
Invariant: the same fbank gives the same samples.

Shapes: T fbank frames, M mel bins, F = n_fft / 2 + 1 bins of the spectrum, S samples.
"""

import functools

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.signal import lfilter

from pipeline.config import FRAME_LENGTH_MS, FRAME_SHIFT_MS, FeatureSpec
from training.report.clips.spectrogram import LOW_HZ, mel

_PREEMPHASIS = 0.97  # Kaldi's default, which the fbank was made with.
_SPECTRUM_STEPS = 12
_PHASE_STEPS = 16
_MOMENTUM = 0.99
_LOUDEST = 0.9

Floats = NDArray[np.float32]


def waveform_of(fbank_TM: NDArray[np.floating], spec: FeatureSpec) -> Floats:
    """A waveform [S] at `spec.sample_rate_hz` whose fbank comes close to `fbank_TM` (valid rows).

    Source: Griffin and Lim 1984, with the momentum of Perraudin, Balazs and Sondergaard 2013.
    Raises: ValueError for no rows.
    """
    if not len(fbank_TM):
        raise ValueError("an fbank of no frames has no sound")
    length = int(spec.sample_rate_hz * FRAME_LENGTH_MS / 1000)
    shift = int(spec.sample_rate_hz * FRAME_SHIFT_MS / 1000)
    n_fft = 1 << (length - 1).bit_length()
    power_TM = np.exp(np.clip(fbank_TM.astype(np.float32), -16, 20))
    size_TF = np.sqrt(_spectrum(power_TM, _mel_bank(spec.n_mels, n_fft, spec.sample_rate_hz)))
    emphasised_S = _phases(size_TF, _Frames(length, shift, n_fft))
    waveform_S = lfilter([1.0], [1.0, -_PREEMPHASIS], emphasised_S)
    # The filter lifts what lies below the lowest mel bin, where the fbank says nothing.
    waveform_S = lfilter([1.0, -1.0], [1.0, -0.995], waveform_S)
    peak = float(np.abs(waveform_S).max())
    return np.asarray(waveform_S * min(1.0, _LOUDEST / max(peak, 1e-9)), np.float32)


@functools.lru_cache(maxsize=4)
def _mel_bank(n_mels: int, n_fft: int, rate_hz: int) -> Floats:
    """Kaldi's triangles [M, F]; a bin too narrow for any FFT bin takes the nearest one."""
    edges = np.linspace(mel(LOW_HZ), mel(rate_hz / 2), n_mels + 2)[:, None]
    of_bin = np.array([mel(k * rate_hz / n_fft) for k in range(n_fft // 2 + 1)])[None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bank = np.minimum((of_bin - left) / (centre - left), (right - of_bin) / (right - centre))
    bank = np.maximum(bank, 0.0)
    for row in np.flatnonzero(bank.sum(1) == 0):
        bank[row, np.abs(of_bin[0] - centre[row]).argmin()] = 1.0
    return np.asarray(bank, np.float32)


def _spectrum(power_TM: Floats, bank_MF: Floats) -> Floats:
    """A power spectrum [T, F] that the mel bank maps close to `power_TM`.

    Multiplicative steps keep it positive, which the pseudo-inverse does not.
    """
    weight_F = np.maximum(bank_MF.sum(0), 1e-6)
    power_TF = (power_TM / bank_MF.sum(1)) @ bank_MF / weight_F + 1e-9
    for _ in range(_SPECTRUM_STEPS):
        power_TF *= ((power_TM / (power_TF @ bank_MF.T)) @ bank_MF) / weight_F
        power_TF += 1e-12
    return np.asarray(power_TF, np.float32)


class _Frames:
    """Windows of a waveform, and the waveform they overlap to."""

    def __init__(self, length: int, shift: int, n_fft: int) -> None:
        self.length, self.shift, self.n_fft = length, shift, n_fft
        self.n_shifts = -(-length // shift)
        self.window = np.hanning(length).astype(np.float32)

    def spectra(self, waveform_S: Floats, n_frames: int) -> NDArray[np.complex64]:
        """Spectra [T, F] of the first `n_frames` windows."""
        cut = np.lib.stride_tricks.sliding_window_view(waveform_S, self.length)
        windows = cut[: n_frames * self.shift : self.shift] * self.window
        return np.asarray(scipy.fft.rfft(windows, self.n_fft), np.complex64)

    def waveform(self, spectra_TF: NDArray[np.complex64]) -> Floats:
        """The waveform whose windows are nearest to these spectra (least squares)."""
        pieces = scipy.fft.irfft(spectra_TF, self.n_fft)[:, : self.length] * self.window
        weights = np.broadcast_to(self.window**2, pieces.shape)
        whole = self._overlapped(pieces) / np.maximum(self._overlapped(weights), 1e-3)
        return np.asarray(whole, np.float32)

    def _overlapped(self, pieces: Floats) -> Floats:
        n_frames = len(pieces)
        padded = np.zeros((n_frames, self.n_shifts * self.shift), np.float32)
        padded[:, : self.length] = pieces
        parts = padded.reshape(n_frames, self.n_shifts, self.shift)
        whole = np.zeros((n_frames + self.n_shifts - 1, self.shift), np.float32)
        for k in range(self.n_shifts):
            whole[k : k + n_frames] += parts[:, k]
        return whole.reshape(-1)


def _phases(size_TF: Floats, frames: _Frames) -> Floats:
    """The waveform of a spectrum without phases: start at random ones, then agree with overlaps."""
    turns = np.random.default_rng(0).random(size_TF.shape, np.float32)
    spectra = size_TF * np.exp(2j * np.pi * turns).astype(np.complex64)
    before = np.zeros_like(spectra)
    for _ in range(_PHASE_STEPS):
        consistent = frames.spectra(frames.waveform(spectra), len(size_TF))
        ahead = consistent + np.float32(_MOMENTUM) * (consistent - before)
        before = consistent
        spectra = size_TF * ahead / np.maximum(np.abs(ahead), 1e-12)
    return frames.waveform(spectra)
