"""Frames to JPEG, waveform to fbank, and back: the payload columns of the feature store.

Pure arrays: knows nothing of containers, files or Ray. Imports torch only when an fbank is made,
so that readers and the decode child stay light.
Invariant: an fbank is what torchaudio's Kaldi fbank gives CAV-MAE before normalisation; rows past
the clip are zeros.

Shapes: N frames, H = W = frame_size, T fbank_frames, M n_mels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg

from pipeline.config import FRAME_LENGTH_MS, FRAME_SHIFT_MS, FeatureSpec

Fbank = Callable[[np.ndarray], np.ndarray]
"""Mono waveform float32 [samples] to fbank float32 [t, M], before normalisation."""

Fbanks = Callable[[list[np.ndarray]], list[np.ndarray]]
"""Waveforms of several clips to their fbanks as they are stored, float16."""


def encode_jpeg(image_HW3: np.ndarray, quality: int) -> bytes:
    """One RGB uint8 image as a 4:2:0 JPEG."""
    jpeg: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image_HW3), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return jpeg


def decode_jpegs(jpegs: Sequence[bytes | memoryview]) -> np.ndarray:
    """JPEGs of one size as uint8 RGB [N, H, W, 3].

    Raises: ValueError if a payload is not a JPEG.
    """
    first = simplejpeg.decode_jpeg(jpegs[0], colorspace="RGB")
    images = np.empty((len(jpegs), *first.shape), np.uint8)
    images[0] = first
    for image, jpeg in zip(images[1:], jpegs[1:], strict=True):
        image[...] = simplejpeg.decode_jpeg(jpeg, colorspace="RGB")
    return images


def fbank_array(payload: bytes | memoryview, spec: FeatureSpec) -> np.ndarray:
    """A stored fbank as float16 [T, M], before normalisation; a read-only view of the payload."""
    return np.frombuffer(payload, np.float16).reshape(spec.fbank_frames, spec.n_mels)


def fbank_payload(fbank_tM: np.ndarray, spec: FeatureSpec) -> tuple[bytes, int]:
    """Cut or zero-pad an fbank to T rows. Returns its float16 bytes and how many rows are valid."""
    n_valid = min(len(fbank_tM), spec.fbank_frames)
    padded_TM = np.zeros((spec.fbank_frames, spec.n_mels), np.float16)
    padded_TM[:n_valid] = fbank_tM[:n_valid]
    return padded_TM.tobytes(), n_valid


def fbank_function(spec: FeatureSpec) -> Fbank:
    """The function that makes fbanks by torchaudio in this process.

    Source: CAV-MAE's data loader (YuanGongND/cav-mae, dataloader.py): waveform mean removed, then
    Kaldi fbank with a hanning window, htk_compat, no energy, no dither.
    Where a mel bin holds little energy its logarithm is rounding noise of the FFT: another FFT
    (numpy, or MKL on another CPU) moves it by up to 7e-3. The bits of a store are those of a
    process that was started with `fbank_service.ENVIRONMENT`; this function chooses nothing for
    the process it is called in.
    """
    import torch
    from torchaudio.compliance import kaldi

    def fbank(waveform: np.ndarray) -> np.ndarray:
        samples = torch.from_numpy(waveform)
        # Summed by halves: one more rounding in the mean is seen in the bins with little energy.
        half = (len(samples) + 1) // 2
        mean = (samples[:half].sum() + samples[half:].sum()) / len(samples)
        fbank_TM = kaldi.fbank(
            (samples - mean)[None],
            htk_compat=True,
            sample_frequency=spec.sample_rate_hz,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=spec.n_mels,
            dither=0.0,
            frame_length=FRAME_LENGTH_MS,
            frame_shift=FRAME_SHIFT_MS,
        )
        return np.asarray(fbank_TM)

    return fbank


def fbanks_function(spec: FeatureSpec) -> Fbanks:
    """`fbank_function` for several clips at a time."""
    fbank = fbank_function(spec)
    return lambda waveforms: [fbank(waveform).astype(np.float16) for waveform in waveforms]
