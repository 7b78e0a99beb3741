"""The waveform starts with the picture, lasts as long as the sound, and gives CAV-MAE's fbank."""

import math
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.config import FeatureSpec
from pipeline.decode.clip import Clip, extract
from pipeline.decode.fbank_service import ENVIRONMENT
from pipeline.decode.payload import decode_jpegs
from pipeline.decode.sandbox import Sandbox
from pipeline.reasons import Reason, Rejected

FLASH_S, CLIP_S = 3.4, 5.0
SPEC = FeatureSpec(n_frames=125, frame_size=16, duration_s=CLIP_S, resize="squash")

CONTAINERS = {
    "mp4": (".mp4", ["-c:v", "libx264", "-preset", "ultrafast", "-c:a", "aac"], []),
    "mp4_mp3": (".mp4", ["-c:v", "libx264", "-preset", "ultrafast", "-c:a", "libmp3lame"], []),
    "mkv_opus": (".mkv", ["-c:v", "libx264", "-preset", "ultrafast", "-c:a", "libopus"], []),
    "webm": (".webm", ["-c:v", "libvpx-vp9", "-cpu-used", "8", "-c:a", "libopus"], []),
    "avi": (".avi", ["-c:v", "mpeg4", "-c:a", "pcm_s16le"], []),
    "mpegts": (".ts", ["-c:v", "libx264", "-preset", "ultrafast", "-c:a", "aac"], []),
    "mpg": (".mpg", ["-c:v", "mpeg1video", "-c:a", "mp2"], []),
    "edit_list": (".mp4", ["-c", "copy"], ["-ss", "1.3"]),
}


@pytest.fixture(scope="module")
def flash_and_beep(ffmpeg, tmp_path_factory):
    """A black, silent clip; from FLASH_S on for 0.4 s it is white and beeps."""
    folder = tmp_path_factory.mktemp("flash")
    lit = f"between(t,{FLASH_S},{FLASH_S + 0.4})"
    raw = folder / "raw.mkv"
    ffmpeg(
        "-f", "lavfi", "-i",
        f"color=black:s=64x64:r=25:d={CLIP_S},drawbox=c=white:t=fill:enable='{lit}'",
        "-f", "lavfi", "-i", f"aevalsrc='0.8*sin(2*PI*880*t)*{lit}':s=44100:d={CLIP_S}",
        "-c:v", "ffv1", "-c:a", "pcm_s16le", raw,
    )  # fmt: skip
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            suffix, output, before = CONTAINERS[name]
            made[name] = folder / f"{name}{suffix}"
            source = make("mp4") if before else raw
            ffmpeg(*before, "-i", source, *output, made[name])
        return made[name]

    return make


@pytest.fixture
def child():
    """A process that decodes: sound that ends it costs one answer, not the tests."""
    sandbox = Sandbox(
        "pipeline.decode.clip:extract", timeout_s=60, max_calls=500, max_memory_mb=1024
    )
    yield sandbox
    sandbox.close()


def flash_and_beep_times(clip: Clip) -> tuple[float, float]:
    """When the picture turns white, when the sound begins, in s."""
    white = decode_jpegs(clip.frames).mean((1, 2, 3)) > 128
    level = np.abs(clip.waveform)
    return clip.frame_ts_ms[int(white.argmax())] / 1000, float((level > 0.2).argmax()) / 16000


@pytest.mark.parametrize("name", CONTAINERS)
def test_flash_and_beep_are_within_40_ms(name, flash_and_beep):
    clip = extract(str(flash_and_beep(name)), None, None, SPEC)
    flash_s, beep_s = flash_and_beep_times(clip)
    cut_s = 1.3 if name == "edit_list" else 0.0
    assert abs(flash_s - beep_s) < 0.04
    assert abs(beep_s - (FLASH_S - cut_s)) < 0.06


@pytest.mark.parametrize("name", ["mp4", "edit_list", "mkv_opus", "mpegts"])
def test_flash_and_beep_stay_together_in_a_window(name, flash_and_beep):
    cut_s = 1.3 if name == "edit_list" else 0.0
    begin_s = FLASH_S - cut_s - 0.5
    clip = extract(str(flash_and_beep(name)), begin_s, begin_s + 1.0, SPEC)
    flash_s, beep_s = flash_and_beep_times(clip)
    assert abs(flash_s - beep_s) < 0.04
    assert abs(beep_s - 0.5) < 0.06


def test_a_window_of_a_program_stream_has_its_sound(moving_clip, ffmpeg, tmp_path):
    """A seek there ends within a frame of the sound, whose tail cannot be decoded."""
    path = tmp_path / "moving.mpg"
    ffmpeg("-i", moving_clip, "-c:v", "mpeg1video", "-q:v", "3", "-c:a", "mp2", path)
    for start_s in (2.0, 2.6, 3.3, 4.2, 5.0):
        clip = extract(str(path), start_s, start_s + 1.5, FeatureSpec(n_frames=2, frame_size=16))
        assert clip.audio_s == pytest.approx(1.5, abs=1e-3)
        assert np.abs(clip.waveform[:1600]).max() > 0.1  # the tone, from the window's start on


@pytest.mark.parametrize("codec", ["mp2", "ac3"])
def test_a_window_of_a_program_stream_sounds_when_the_whole_does(
    codec, moving_clip, ffmpeg, tmp_path
):
    """A piece of a frame that a seek ends in takes the time of the next one: they were 24 ms off
    with MP2, 32 ms with AC-3."""
    path = tmp_path / "noise.mpg"
    ffmpeg(
        "-i", moving_clip, "-f", "lavfi", "-i", "anoisesrc=d=7:r=48000:seed=1,lowpass=f=500",
        "-map", "0:v", "-map", "1:a", "-c:v", "mpeg2video", "-q:v", "3", "-c:a", codec,
        path,
    )  # fmt: skip
    spec = FeatureSpec(n_frames=2, frame_size=16)
    whole = extract(str(path), None, None, spec).waveform
    for start_s in np.arange(1.1, 5.0, 0.23):
        clip = extract(str(path), start_s, start_s + 1.5, spec)
        begin = round(start_s * 16_000)
        of_whole = whole[begin : begin + len(clip.waveform)]
        assert np.corrcoef(clip.waveform, of_whole)[0, 1] > 0.98, start_s


def test_a_place_that_a_program_stream_cannot_seek_to_is_reached_from_before(ffmpeg, tmp_path):
    """Of a still picture and AC-3 FFmpeg refuses every fifth place, with EPERM."""
    path = tmp_path / "still.mpg"
    beeps = "aevalsrc=0.8*sin(6283*t)*lt(mod(t\\,1)\\,0.04):d=10:s=48000"
    picture = ("-f", "lavfi", "-i", "color=s=320x240:r=25:d=10")
    made_as = ("-c:v", "mpeg2video", "-q:v", "3", "-c:a", "ac3", "-f", "vob")
    ffmpeg(*picture, "-f", "lavfi", "-i", beeps, "-t", "10", *made_as, path)
    for start_s in (2.1, 2.6, 2.9, 4.2):
        clip = extract(str(path), start_s, start_s + 3, FeatureSpec(n_frames=2, frame_size=16))
        assert clip.audio_s == pytest.approx(3.0, abs=1e-3)
        loud_s = np.flatnonzero(np.abs(clip.waveform) > 0.2) / 16_000 + start_s
        assert loud_s[0] == pytest.approx(math.ceil(start_s), abs=0.04)


def test_a_program_stream_that_begins_within_a_frame_is_decoded(flash_and_beep, tmp_path):
    """As a recording of a broadcast does: the first packets are tails of what was cut off."""
    data = flash_and_beep("mpg").read_bytes()
    cut = tmp_path / "cut.mpg"
    cut.write_bytes(data[len(data) // 5 // 2048 * 2048 :])  # 2048: a packet of the container
    flash_s, beep_s = flash_and_beep_times(extract(str(cut), None, None, SPEC))
    assert abs(flash_s - beep_s) < 0.04
    assert 1.5 < beep_s < FLASH_S - 0.5


def test_the_check_sees_sound_that_is_late(flash_and_beep):
    clip = extract(str(flash_and_beep("mp4")), None, None, SPEC)
    clip.waveform = np.concatenate([np.zeros(960, np.float32), clip.waveform])
    flash_s, beep_s = flash_and_beep_times(clip)
    assert abs(flash_s - beep_s) > 0.04


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
def test_duration_is_exact_for_any_rate_and_layout(rate, layout, moving_clip, ffmpeg, tmp_path):
    path = tmp_path / "clip.mkv"
    sound = f"sine=f=300:r={rate}:d=3,aformat=channel_layouts={layout}"
    ffmpeg("-i", moving_clip, "-f", "lavfi", "-i", sound, "-map", "0:v", "-map", "1:a",
           "-t", "3", "-c:v", "copy", "-c:a", "pcm_s16le", path)  # fmt: skip
    clip = extract(str(path), None, None, FeatureSpec(n_frames=2, frame_size=16))
    assert len(clip.waveform) == pytest.approx(3 * 16000, abs=2)
    assert clip.audio_s == pytest.approx(3.0, abs=1e-3)


def test_channels_are_averaged_or_the_first_is_taken(moving_clip, ffmpeg, tmp_path):
    path = tmp_path / "clip.mkv"
    sound = "aevalsrc='0.5*sin(2*PI*200*t)|0.25':s=16000:d=2"
    ffmpeg("-i", moving_clip, "-f", "lavfi", "-i", sound, "-map", "0:v", "-map", "1:a",
           "-t", "2", "-c:v", "copy", "-c:a", "pcm_s16le", path)  # fmt: skip
    spec = FeatureSpec(n_frames=2, frame_size=16)
    mean = extract(str(path), None, None, spec).waveform
    first = extract(
        str(path), None, None, spec.model_copy(update={"audio_channel": "first"})
    ).waveform
    tone = 0.5 * np.sin(2 * np.pi * 200 * np.arange(len(first)) / 16000)
    assert np.abs(first - tone).max() < 1e-3
    assert np.abs(mean - (tone + 0.25) / 2).max() < 1e-3


@pytest.mark.parametrize(
    ("container", "codec", "n_channels"),
    [(".mkv", "pcm_f32le", 8), (".mov", "pcm_s24le", 8), (".mkv", "wavpack", 8),
     (".mkv", "pcm_s16le", 12), (".mov", "pcm_s16le", 12)],
)  # fmt: skip
def test_sound_of_many_channels_is_averaged_or_the_first_is_taken(
    container, codec, n_channels, child, moving_clip, ffmpeg, tmp_path
):
    """Every channel has a tone of its own: one that is left out, or mixed in, is seen."""
    path = tmp_path / f"clip{container}"
    tones = "|".join(f"0.5*sin(2*PI*{200 + 100 * i}*t)" for i in range(n_channels))
    layout = "7.1" if n_channels == 8 else f"{n_channels}c"
    ffmpeg("-i", moving_clip, "-f", "lavfi", "-i", f"aevalsrc='{tones}':s=16000:d=2:c={layout}",
           "-map", "0:v", "-map", "1:a", "-t", "2", "-c:v", "copy", "-c:a", codec,
           path)  # fmt: skip
    time_s = np.arange(32000) / 16000
    tones_CT = [0.5 * np.sin(2 * np.pi * (200 + 100 * i) * time_s) for i in range(n_channels)]
    spec = FeatureSpec(n_frames=2, frame_size=16)
    for rule, expected in (("mean", np.mean(tones_CT, axis=0)), ("first", tones_CT[0])):
        child.submit(str(path), None, None, spec.model_copy(update={"audio_channel": rule}))
        waveform = child.result().waveform
        assert len(waveform) == len(expected)
        assert np.abs(waveform - expected).max() < 1e-3


def test_a_gap_in_the_sound_is_silence_of_the_right_length(moving_clip, ffmpeg, tmp_path):
    path = tmp_path / "gap.mkv"
    gap = "aselect='lt(t,1)+gt(t,3)'"
    ffmpeg("-i", moving_clip, "-c:v", "copy", "-af", gap, "-c:a", "pcm_s16le", "-t", "5", path)
    clip = extract(str(path), None, None, FeatureSpec(n_frames=2, frame_size=16, min_audio_s=0.1))
    quiet = np.abs(clip.waveform) < 1e-6
    assert quiet[18000:46000].all()
    assert not quiet[50000:70000].all()
    assert clip.audio_s == pytest.approx(3.0, abs=0.1)


def test_silence_is_kept_and_flagged(moving_clip, ffmpeg, tmp_path):
    path = tmp_path / "silent.mp4"
    ffmpeg("-i", moving_clip, "-t", "2", "-c:v", "copy", "-af", "volume=0", path)
    assert extract(str(path), None, None, FeatureSpec(n_frames=2, frame_size=16)).flags & 4


def test_sound_that_ends_early_is_refused(moving_clip, ffmpeg, tmp_path):
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    ffmpeg("-i", moving_clip, "-c", "copy", "-movflags", "+faststart", whole)
    cut.write_bytes(whole.read_bytes()[: int(0.6 * whole.stat().st_size)])
    with pytest.raises(Rejected) as caught:
        extract(str(cut), None, None, FeatureSpec(n_frames=2, frame_size=16))
    assert caught.value.reason in (Reason.AUDIO_SHORT, Reason.AUDIO_DECODE)


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [(slice(0, 1), None), (slice(0, 30), Reason.AUDIO_SHORT), (slice(30, 31), Reason.AUDIO_DECODE),
     (slice(None), Reason.AUDIO_DECODE)],
    ids=["first", "first_third", "middle", "all"],
)  # fmt: skip
def test_sound_that_is_damaged_is_refused_but_for_its_first_packets(
    damaged, reason, moving_clip, ffmpeg, tmp_path
):
    path = tmp_path / "damaged.mkv"
    ffmpeg("-i", moving_clip, "-t", "3", "-c:v", "copy", "-c:a", "ac3", path)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
    assert len(packets) > 80
    for packet in packets[damaged]:
        at = data.index(packet)
        data[at : at + len(packet)] = bytes(len(packet))
    path.write_bytes(data)
    spec = FeatureSpec(n_frames=2, frame_size=16)
    if reason is None:
        assert extract(str(path), None, None, spec).audio_s > 2.9
        return
    with pytest.raises(Rejected) as caught:
        extract(str(path), None, None, spec)
    assert caught.value.reason is reason


_FBANK = """
import sys
import numpy as np
from pipeline.config import FeatureSpec
from pipeline.decode.payload import fbank_function
wave = np.load(sys.argv[1])
np.save(sys.argv[2], fbank_function(FeatureSpec())(wave))
"""


def test_fbank_equals_the_formula_of_cavmae(tmp_path):
    """Against the same definition written out in float64, where rounding is not the signal."""
    rng = np.random.default_rng(0)
    t = np.arange(160_000) / 16_000
    wave = (0.3 * np.sin(2 * np.pi * 440 * t) + 0.05 * rng.normal(size=len(t))).astype(np.float32)
    np.save(tmp_path / "wave.npy", wave + np.float32(0.05))
    subprocess.run(
        [sys.executable, "-c", _FBANK, tmp_path / "wave.npy", tmp_path / "fbank.npy"],
        check=True,
        env=os.environ | ENVIRONMENT,
    )
    made = np.load(tmp_path / "fbank.npy")
    assert made.shape == (998, 128)
    assert np.abs(made - kaldi_fbank(wave.astype(np.float64))).max() < 1e-3


def kaldi_fbank(wave: np.ndarray) -> np.ndarray:
    def mel(hz):
        return 1127.0 * np.log(1 + np.asarray(hz) / 700.0)

    wave = wave - wave.mean()
    frames = np.lib.stride_tricks.sliding_window_view(wave, 400)[::160]
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft(frames * np.hanning(400), 512)) ** 2
    edges = np.linspace(mel(20.0), mel(8000.0), 130)
    bins = mel(np.arange(257) * 16_000 / 512)[None]
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    weights = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    weights = np.maximum(weights, 0)
    weights[:, 256] = 0
    return np.log(np.maximum(power @ weights.T, 1.1920928955078125e-07))
