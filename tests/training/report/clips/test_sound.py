"""Sound on a page: what is played is the clip's own, or its fbank's, and says which."""

import io
import os
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config import FeatureSpec
from pipeline.decode.payload import fbank_function
from pipeline.reasons import Rejected
from training.report.clips.inversion import waveform_of
from training.report.clips.sound import EXCERPT_RATE_HZ, EXCERPT_S, encode_sound, excerpt
from training.report.clips.spectrogram import axes_in_words, colours, heights_of_hz

SPEC = FeatureSpec()
RATE = SPEC.sample_rate_hz


def _chirp(seconds: float = 2.0, rate_hz: int = RATE) -> NDArray[np.float32]:
    """A tone that rises from 300 Hz to 3 kHz, on and off four times a second."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    tone = np.sin(2 * np.pi * (300 + 1350 * t / seconds) * t) * (np.sin(8 * np.pi * t) > 0)
    return (0.3 * tone).astype(np.float32)


def _decoded(webm: bytes) -> NDArray[np.float32]:
    with av.open(io.BytesIO(webm)) as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=RATE)
        frames = [x for f in (*container.decode(stream), None) for x in resampler.resample(f)]
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


def _noise(n: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 0.1, n).astype(np.float32)


def _error(heard: NDArray[np.float32], meant: NDArray[np.float32]) -> float:
    """Mean difference of two fbanks, in nats, where the second one is loud."""
    fbank = fbank_function(SPEC)
    heard_TM, meant_TM = fbank(heard), fbank(meant)
    n = min(len(heard_TM), len(meant_TM))
    loud = meant_TM[:n] > np.percentile(meant_TM, 80)
    return float(np.abs(heard_TM[:n] - meant_TM[:n])[loud].mean())


def _strongest_hz(waveform: NDArray[np.float32]) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(spectrum.argmax() * RATE / len(waveform))


def test_an_encoded_sound_is_small_and_the_same_to_the_ear() -> None:
    chirp = _chirp(EXCERPT_S)
    webm = encode_sound(chirp, RATE)
    assert len(webm) < 3000 * EXCERPT_S
    again = _decoded(webm)
    assert len(again) == pytest.approx(len(chirp), abs=0.03 * RATE)
    n = min(len(again), len(chirp))
    assert _error(again[:n], chirp[:n]) < 2.0
    assert _error(_noise(n), chirp[:n]) > 3.0  # The negative control.
    assert encode_sound(chirp, RATE) == webm


def test_a_synthesised_sound_has_the_fbank_it_was_made_from() -> None:
    meant = fbank_function(SPEC)(_chirp())
    made = waveform_of(meant, SPEC)
    assert len(made) == pytest.approx(len(_chirp()), abs=0.02 * RATE)
    assert _error(made, _chirp()) < 0.8
    assert _error(_noise(len(made)), _chirp()) > 3.0  # The negative control.
    assert np.array_equal(waveform_of(meant, SPEC), made)


@pytest.mark.parametrize("hz", [440.0, 2000.0])
def test_a_tone_keeps_its_pitch_and_silence_stays_silent(hz: float) -> None:
    tone = (0.2 * np.sin(2 * np.pi * hz * np.arange(RATE) / RATE)).astype(np.float32)
    made = waveform_of(fbank_function(SPEC)(tone), SPEC)
    assert _strongest_hz(made) == pytest.approx(hz, rel=0.06)
    silence = waveform_of(np.full((50, SPEC.n_mels), -15.94, np.float32), SPEC)
    assert np.abs(silence).max() < 0.01  # Kaldi's floor of -15.94 nats, heard as hardly a hiss.


def _clip(path: Path, seconds: float, begin_hz: float, then_hz: float) -> Path:
    """A video whose tone changes after a second."""
    t = np.arange(round(seconds * RATE)) / RATE
    tone = 0.3 * np.sin(2 * np.pi * np.where(t < 1, begin_hz, then_hz) * t)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        audio = container.add_stream("aac", rate=RATE)
        audio.layout = "mono"
        for k in range(round(10 * seconds)):
            image = np.full((64, 64, 3), 20 * k % 255, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image)))
        frame = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], "fltp", "mono")
        frame.sample_rate = RATE
        for stream, part in ((video, None), (audio, frame), (audio, None)):
            container.mux(stream.encode(part))
    return path


def test_an_excerpt_is_the_sound_of_the_clips_window(tmp_path: Path) -> None:
    path = _clip(tmp_path / "clip.mp4", 8.0, 500.0, 1500.0)
    first = _decoded(excerpt(str(path), None, None))
    assert len(first) == pytest.approx(EXCERPT_S * RATE, rel=0.03)
    assert _strongest_hz(first[: RATE // 2]) == pytest.approx(500, rel=0.02)
    later = _decoded(excerpt(str(path), 2.0, 4.0))
    assert len(later) == pytest.approx(2 * RATE, rel=0.05)
    assert _strongest_hz(later[: RATE // 2]) == pytest.approx(1500, rel=0.02)
    assert EXCERPT_RATE_HZ > RATE


def test_a_file_that_is_no_clip_has_no_excerpt(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(os.urandom(1000))
    with pytest.raises(Rejected):
        excerpt(str(tmp_path / "x.mp4"), None, None)


def test_spectrogram_has_low_tones_at_the_bottom_and_copes_with_silence() -> None:
    fbank = np.full((20, 8), -10.0, np.float32)
    fbank[:, 1] = 3.0
    picture = colours(fbank)
    assert picture.shape == (8, 20, 3)
    assert picture[6].sum() > 3 * picture[0].sum()
    assert colours(np.zeros((5, 4), np.float32)).max() <= 34


def test_axes_are_those_of_the_spec() -> None:
    assert axes_in_words(SPEC).startswith("time from left to right (up to 10 s)")
    assert "20 Hz to 8 kHz" in axes_in_words(SPEC)
    marks = heights_of_hz(SPEC, (10, 1000, 8000, 9000))
    assert [hz for hz, _ in marks] == [1000, 8000]
    assert [round(height, 2) for _, height in marks] == [0.34, 1.0]
