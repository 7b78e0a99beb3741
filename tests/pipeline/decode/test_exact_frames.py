"""Stored frames are those ffmpeg shows at the stored time, in whatever the clip comes."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import FeatureSpec
from pipeline.decode.clip import Clip, extract
from pipeline.decode.payload import decode_jpegs
from pipeline.reasons import Reason, Rejected

SPEC = FeatureSpec(n_frames=8, frame_size=48, resize="squash", duration_s=5.0)

VARIANTS = {
    "clean": (".mp4", ["-c", "copy"]),
    "mkv": (".mkv", ["-c", "copy"]),
    "mpegts": (".ts", ["-c", "copy"]),
    "cut_in_mkv": (".mkv", ["-c", "copy"], ["-ss", "3.7"]),
    "edit_list": (".mp4", ["-c", "copy", "-t", "3"], ["-ss", "3.7"]),
    "edit_list_at_start": (".mp4", ["-c", "copy"], ["-ss", "0.5"]),
    "no_b_frames": (".mp4", ["-c:v", "libx264", "-preset", "ultrafast", "-bf", "0"]),
    "many_b_frames": (
        ".mp4",
        ["-c:v", "libx264", "-preset", "fast", "-bf", "8", "-b_strategy", "2"],
    ),
    "open_gop": (".mp4", ["-c:v", "libx264", "-preset", "fast", "-g", "12", "-flags", "-cgop"]),
    "vfr": (".mp4", ["-vf", r"select='not(mod(n\,3))+gt(t\,3)',setpts=PTS", "-fps_mode", "vfr"]),
    "pause": (
        ".mp4",
        [
            r"-vf",
            r"select=lt(t\,1.4)+gt(t\,3.4)",
            r"-fps_mode",
            r"vfr",
            r"-t",
            r"4.4",
            r"-c:v",
            r"libx264",
            r"-preset",
            r"fast",
            r"-bf",
            r"3",
            r"-b_strategy",
            r"0",
        ],
    ),
    "ten_bit": (".mp4", ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p10le"]),
    "yuv444": (".mp4", ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv444p"]),
    "hevc": (".mp4", ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=0"]),
    "vp9": (".webm", ["-c:v", "libvpx-vp9", "-cpu-used", "8", "-c:a", "libopus"]),
    "vp8": (".webm", ["-c:v", "libvpx", "-cpu-used", "8", "-c:a", "libvorbis"]),
    "av1": (".mkv", ["-c:v", "libsvtav1", "-preset", "12", "-c:a", "aac"]),
    "avi": (".avi", ["-c:v", "mpeg4", "-q:v", "3", "-c:a", "mp3"]),
    "avi_b_frames": (".avi", ["-c:v", "mpeg4", "-bf", "2", "-q:v", "3", "-c:a", "mp3"]),
    "mpg": (".mpg", ["-c:v", "mpeg1video", "-q:v", "3", "-c:a", "mp2"]),
    "mjpeg": (".mov", ["-c:v", "mjpeg", "-q:v", "5", "-c:a", "pcm_s16le"]),
    "odd_size": (".mp4", ["-vf", "scale=161:119", "-pix_fmt", "yuv444p", "-preset", "ultrafast"]),
    "late_picture": (".mkv", ["-c", "copy"], ["-itsoffset", "0.7"]),
}


@pytest.fixture(scope="module")
def variant(moving_clip, ffmpeg, tmp_path_factory):
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            suffix, output, *before = VARIANTS[name]
            path = made[name] = tmp_path_factory.mktemp(name) / f"clip{suffix}"
            inputs = [*(before[0] if before else []), "-i", moving_clip]
            if name == "late_picture":
                inputs = ["-i", moving_clip, *inputs, "-map", "1:v", "-map", "0:a"]
            ffmpeg(*inputs, *output, path)
        return made[name]

    return make


def ranks(clip: Clip, shown: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    """For each stored frame: the rank of ffmpeg's frame at its time, and of the one that looks
    most alike."""
    times, frames = shown
    pairs = []
    for time_ms, image in zip(clip.frame_ts_ms, decode_jpegs(clip.frames), strict=True):
        at_time = int(np.abs(times * 1000 - time_ms).argmin())
        alike = int(np.abs(frames.astype(int) - image).mean((1, 2, 3)).argmin())
        pairs.append((at_time, alike))
    return pairs


@pytest.mark.parametrize("name", VARIANTS)
def test_stored_frame_is_what_ffmpeg_shows_at_the_stored_time(name, variant, ffmpeg_frames):
    path = variant(name)
    clip = extract(str(path), None, None, SPEC)
    times, frames = ffmpeg_frames(path)
    pairs = ranks(clip, (times, frames))
    assert all(abs(at_time - alike) <= 1 for at_time, alike in pairs), pairs
    # The stored times are spread over the presentable duration: the frame on screen at t is the
    # last one that began before t.
    step = np.median(np.diff(times))
    duration = min(times[-1] + step, 5.0) - times[0]
    wanted = times[0] + (np.arange(8) + 0.5) * duration / 8
    expected = times[np.searchsorted(times, wanted + 1e-3, side="right") - 1]
    assert np.abs(np.array(clip.frame_ts_ms) / 1000 - expected).max() <= 1.5 * step


def test_the_check_sees_frames_of_another_time(variant, ffmpeg_frames):
    path = variant("edit_list")
    clip = extract(str(path), None, None, SPEC)
    clip.frame_ts_ms = [time_ms + 500 for time_ms in clip.frame_ts_ms]
    assert any(abs(a - b) > 1 for a, b in ranks(clip, ffmpeg_frames(path)))


def test_decord_alone_would_be_seconds_off_on_an_edit_list(variant):
    import decord

    reader = decord.VideoReader(str(variant("edit_list")))
    clip = extract(str(variant("edit_list")), None, None, SPEC)
    assert clip.decoder == "pyav"
    assert clip.flags & 1
    # It counts the packets that the edit list discards as frames.
    assert len(reader) > 3 * 25 + 30


@pytest.mark.parametrize("name", ["edit_list", "vfr"])
def test_forced_decord_refuses_an_unclean_timeline(name, variant):
    with pytest.raises(Rejected) as caught:
        extract(str(variant(name)), None, None, SPEC.model_copy(update={"decoder": "decord"}))
    assert caught.value.reason == Reason.TIMELINE_UNCLEAN


@pytest.mark.parametrize("size", [96, 224])
@pytest.mark.parametrize(("gop", "faster"), [(5, "decord"), (125, "pyav")])
def test_both_decoders_give_the_same_pictures(size, gop, faster, moving_clip, ffmpeg, tmp_path):
    """decord is taken where it needs few of the frames."""
    path = tmp_path / "five.mp4"
    ffmpeg("-i", moving_clip, "-t", "5", "-c:v", "libx264", "-preset", "fast", "-g", gop, path)
    spec = FeatureSpec(n_frames=8, frame_size=size, duration_s=5.0)
    clips = [
        extract(str(path), None, None, spec.model_copy(update={"decoder": decoder}))
        for decoder in ("auto", "decord", "pyav")
    ]
    assert [clip.decoder for clip in clips] == [faster, "decord", "pyav"]
    assert clips[0].frame_ts_ms == clips[1].frame_ts_ms == clips[2].frame_ts_ms
    first, second = (decode_jpegs(clip.frames).astype(int) for clip in clips[1:])
    assert np.abs(first - second).mean() < 4  # saturated test bars; 17 for the next frame


TURNS = {
    "90": ["-display_rotation", "90"],
    "180": ["-display_rotation", "180"],
    "270": ["-display_rotation", "270"],
    "left_to_right": ["-display_hflip"],
    "upside_down": ["-display_vflip"],
    "90_and_mirrored": ["-display_rotation", "90", "-display_hflip"],
    "270_and_mirrored": ["-display_rotation", "270", "-display_hflip"],
}


@pytest.fixture(scope="module")
def jumpy_clip(moving_clip, ffmpeg, tmp_path_factory) -> Path:
    """Of key frames enough for decord to jump between."""
    path = tmp_path_factory.mktemp("jumpy") / "jumpy.mp4"
    ffmpeg("-i", moving_clip, "-t", "3", "-c:v", "libx264", "-g", "5", "-c:a", "copy", path)
    return path


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(
    ("clip_of", "resize"),
    [("moving_clip", "crop"), ("moving_clip", "squash"), ("jumpy_clip", "crop")],
)
def test_display_matrix_is_applied(turn, resize, clip_of, request, ffmpeg, ffmpeg_frames, tmp_path):
    path = tmp_path / "turned.mp4"
    ffmpeg(*TURNS[turn], "-i", request.getfixturevalue(clip_of), "-t", "3", "-c", "copy", path)
    upright = tmp_path / "upright.mkv"
    keep = "crop=120:120," if resize == "crop" else ""
    ffmpeg("-i", path, "-vf", f"{keep}scale=64:64:flags=bilinear", "-an", "-c:v", "ffv1", upright)
    clip = extract(
        str(path), None, None, SPEC.model_copy(update={"resize": resize, "frame_size": 64})
    )
    times, frames = ffmpeg_frames(upright, 64)
    assert clip.flags & 2
    for time_ms, image in zip(clip.frame_ts_ms, decode_jpegs(clip.frames), strict=True):
        at_time = frames[np.abs(times * 1000 - time_ms).argmin()].astype(int)
        assert np.abs(at_time - image).mean() < 15  # 50 and more for another turn


def test_forced_decord_refuses_a_display_matrix(jumpy_clip, ffmpeg, tmp_path):
    path = tmp_path / "turned.mp4"
    forced = SPEC.model_copy(update={"decoder": "decord", "frame_size": 64})
    assert extract(str(jumpy_clip), None, None, forced).decoder == "decord"
    ffmpeg("-display_vflip", "-i", jumpy_clip, "-c", "copy", path)
    with pytest.raises(Rejected) as caught:
        extract(str(path), None, None, forced)
    assert caught.value.reason == Reason.TIMELINE_UNCLEAN


def test_wide_pixels_are_shown_wide(moving_clip, ffmpeg, ffmpeg_frames, tmp_path):
    path = tmp_path / "anamorphic.mp4"
    ffmpeg("-i", moving_clip, "-t", "2", "-vf", "scale=80:120,setsar=2", path)
    square = tmp_path / "square.mkv"
    ffmpeg("-i", moving_clip, "-t", "2", "-vf", "crop=120:120", "-an", "-c:v", "ffv1", square)
    clip = extract(str(path), None, None, FeatureSpec(n_frames=4, frame_size=48))
    times, frames = ffmpeg_frames(square)
    for time_ms, image in zip(clip.frame_ts_ms, decode_jpegs(clip.frames), strict=True):
        at_time = frames[np.abs(times * 1000 - time_ms).argmin()].astype(int)
        assert np.abs(at_time - image).mean() < 15


@pytest.mark.parametrize("name", ["clean", "edit_list", "mkv", "mpegts", "vp9", "avi_b_frames"])
@pytest.mark.parametrize("start_s", [0.0, 1.7])
def test_a_window_of_an_untrimmed_file_is_exact(name, start_s, variant, ffmpeg_frames):
    path = variant(name)
    clip = extract(str(path), start_s, start_s + 1.2, SPEC)
    times, frames = ffmpeg_frames(path)
    clip.frame_ts_ms = [time_ms + round(1000 * start_s) for time_ms in clip.frame_ts_ms]
    pairs = ranks(clip, (times, frames))
    assert all(abs(at_time - alike) <= 1 for at_time, alike in pairs), pairs
    assert times[pairs[0][0]] >= start_s - 0.05
    assert times[pairs[-1][0]] <= start_s + 1.2
    assert clip.audio_s == pytest.approx(1.2, abs=0.03)
