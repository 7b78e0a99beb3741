"""Mutated files: no crash of the run, no hang, no silently short sound, no misplaced frame."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import FeatureSpec
from pipeline.decode.clip import Clip, extract
from pipeline.decode.payload import decode_jpegs
from pipeline.decode.sandbox import Sandbox
from pipeline.reasons import Reason, Rejected

SPEC = FeatureSpec(n_frames=6, frame_size=32, resize="squash", duration_s=5.0)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, a stretch zeroed, cut, or swapped with another stretch."""
    bad = bytearray(data)
    at, length = int(rng.integers(len(bad))), int(rng.integers(1, max(2, len(bad) // 10)))
    kind = rng.integers(5)
    if kind == 0:
        for position in rng.integers(len(bad), size=rng.integers(1, 400)):
            bad[position] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        bad[at : at + length] = bytes(len(bad[at : at + length]))
    elif kind == 2:
        del bad[at:]
    elif kind == 3:
        del bad[at : at + length]
    else:
        other = int(rng.integers(len(bad)))
        bad[at : at + length] = bad[other : other + length]
    return bytes(bad)


def check_mutants(originals: list[Path], n: int, folder: Path, seed: int) -> dict[str, int]:
    """Decode n mutants in a sandbox, check what is accepted. Returns how they ended."""
    rng = np.random.default_rng(seed)
    whole = [extract(str(path), None, None, SPEC) for path in originals]
    sandbox = Sandbox(
        "pipeline.decode.clip:extract", timeout_s=30.0, max_calls=500, max_memory_mb=1024
    )
    ended: dict[str, int] = {}
    try:
        for i in range(n):
            which = int(rng.integers(len(originals)))
            path = folder / f"mutant{originals[which].suffix}"
            path.write_bytes(mutate(originals[which].read_bytes(), rng))
            sandbox.submit(str(path), None, None, SPEC)
            try:
                clip = sandbox.result()
                check_accepted(clip, whole[which], f"mutant {i} of {originals[which].name}")
                reason = "ok"
            except Rejected as rejected:
                reason = rejected.reason.value
            ended[reason] = ended.get(reason, 0) + 1
    finally:
        sandbox.close()
    return ended


def check_accepted(clip: Clip, whole: Clip, what: str) -> None:
    # A header that is cut or changed may promise less; then less is stored, and told.
    assert len(clip.waveform) / 16000 >= 0.9 * clip.audio_s, what
    assert np.isfinite(clip.waveform).all(), what
    assert clip.frame_ts_ms == sorted(clip.frame_ts_ms), what
    if abs(clip.video_s - whole.video_s) > 0.1:
        return
    # The same stretch of time: a frame that looks like one of the original is of its time.
    pictures = decode_jpegs(whole.frames).astype(int)
    for rank, (time_ms, image) in enumerate(
        zip(clip.frame_ts_ms, decode_jpegs(clip.frames), strict=True)
    ):
        differences = np.abs(pictures - image).mean((1, 2, 3))
        if differences.min() < 3:
            assert int(differences.argmin()) == rank, (what, time_ms, differences)


@pytest.fixture(scope="module")
def originals(moving_clip, ffmpeg, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("originals")
    made = {
        "clean.mp4": ["-c:v", "libx264", "-preset", "ultrafast", "-movflags", "+faststart"],
        "plain.mkv": ["-c:v", "libx264", "-preset", "ultrafast"],
        "plain.ts": ["-c:v", "libx264", "-preset", "ultrafast"],
        "plain.avi": ["-c:v", "mpeg4", "-c:a", "mp3"],
    }
    for name, options in made.items():
        ffmpeg("-i", moving_clip, "-t", "4", *options, folder / name)
    return [folder / name for name in made]


def test_mutated_clips_end_ok_or_rejected(originals, tmp_path):
    ended = check_mutants(originals, 80, tmp_path, seed=0)
    assert sum(ended.values()) == 80
    assert len(ended) > 3


@pytest.mark.soak
def test_a_thousand_mutated_clips_end_ok_or_rejected(originals, tmp_path):
    assert sum(check_mutants(originals, 1000, tmp_path, seed=1).values()) == 1000


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", Reason.OPEN_FAILED), (b"text " * 99, Reason.OPEN_FAILED), (b"\0" * 9999, None)],
)
def test_what_is_no_video_is_told(content, reason, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(Rejected) as caught:
        extract(str(path), None, None, SPEC)
    assert reason in (None, caught.value.reason)
    assert str(tmp_path) not in caught.value.detail


def test_a_container_under_another_name_is_decoded_all_the_same(moving_clip, tmp_path):
    path = tmp_path / "clip.avi"
    shutil.copy(moving_clip, path)
    assert len(extract(str(path), None, None, SPEC).frames) == 6


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["-an"], Reason.NO_AUDIO), (["-vn"], Reason.NO_VIDEO)],
)
def test_a_missing_stream_is_told(options, reason, moving_clip, ffmpeg, tmp_path):
    path = tmp_path / "clip.mp4"
    ffmpeg("-i", moving_clip, "-c", "copy", *options, path)
    with pytest.raises(Rejected) as caught:
        extract(str(path), None, None, SPEC)
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_a_window_after_the_end_says_where_both_are(name, moving_clip, ffmpeg, tmp_path):
    """The clip has 3 s of picture and 7 s of sound."""
    path = tmp_path / name
    ffmpeg("-t", "3", "-i", moving_clip, "-i", moving_clip, "-map", "0:v", "-map", "1:a",
           "-c", "copy" if name != "clip.avi" else "mpeg4", "-c:a", "mp3", path)  # fmt: skip
    for start_s, reason, told in (
        (1900.0, Reason.AUDIO_SHORT, r"the window begins at 1900 s, the sound ends at 7\.\d\d s"),
        (5.1, Reason.VIDEO_SHORT, r"the window begins at 5\.1 s, the picture ends at 3\.\d\d s"),
    ):
        with pytest.raises(Rejected) as caught:
            extract(str(path), start_s, start_s + 2, SPEC)
        assert caught.value.reason == reason
        assert re.fullmatch(told, caught.value.detail)


def test_limits_of_length_are_told(moving_clip):
    for changed, reason in (
        ({"max_clip_s": 3.0}, Reason.TOO_LONG),
        ({"min_audio_s": 6.0}, Reason.AUDIO_SHORT),
        ({"min_video_s": 6.0}, Reason.VIDEO_SHORT),
    ):
        with pytest.raises(Rejected) as caught:
            extract(str(moving_clip), None, None, SPEC.model_copy(update=changed))
        assert caught.value.reason == reason


def test_a_window_behind_the_end_is_told(moving_clip):
    with pytest.raises(Rejected) as caught:
        extract(str(moving_clip), 100.0, 102.0, SPEC)
    assert caught.value.reason in (Reason.NO_VIDEO, Reason.NO_AUDIO, Reason.VIDEO_SHORT,
                                   Reason.AUDIO_SHORT)  # fmt: skip
