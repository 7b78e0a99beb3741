"""Each stored frame is the very one that ffmpeg shows at its time, in every kind of container.

The frames of the clips here are numbered: their number is written into them, a bit a block.
"""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import FeatureSpec
from pipeline.decode.clip import Clip, extract
from pipeline.decode.payload import decode_jpegs
from pipeline.reasons import Reason, Rejected

N_FRAMES, SIZE = 250, 96
# decord fails at pictures whose rows are no multiple of 32 bytes: 64 pixels, not 48.
SPEC = FeatureSpec(n_frames=8, frame_size=64, duration_s=10.0)

_OPEN_X265 = "log-level=0:keyint=12:min-keyint=12:open-gop=1:bframes=4:scenecut=0:pools=none"
_X265 = ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", _OPEN_X265, "-c:a", "aac"]
_MPEG2 = ["-c:v", "mpeg2video", "-g", "12", "-bf", "2", "-q:v", "2", "-c:a", "mp2"]
_H264 = ["-c:v", "libx264", "-g", "12", "-bf", "3", "-c:a", "aac"]

COUNTABLE = {
    "h264.mp4": _H264,
    "h264.mkv": _H264,
    "vp9.webm": ["-c:v", "libvpx-vp9", "-g", "12", "-cpu-used", "8", "-c:a", "libopus"],
}
"""Clips of many key frames that decord jumps between."""

UNCOUNTABLE = {
    "mpeg2.mpg": [*_MPEG2, "-f", "vob"],
    "mpeg2.ts": _MPEG2,
    "mpeg2.m2ts": _MPEG2,
    "no_b_frames.ts": ["-c:v", "libx264", "-g", "12", "-bf", "0", "-c:a", "aac"],
    "h264.avi": [*_H264[:-1], "mp3"],
    "wmv.wmv": ["-c:v", "wmv2", "-g", "12", "-q:v", "2", "-c:a", "wmav2"],
    "open_gop_hevc.mkv": _X265,
    "open_gop_mpeg2.mkv": _MPEG2,
    "open_gop_mpeg2.mp4": _MPEG2,
    "open_gop_mpeg4.mp4": ["-c:v", "mpeg4", "-g", "12", "-bf", "2", "-q:v", "2", "-c:a", "aac"],
}
"""Such clips in which decord's jumps land elsewhere, by up to 9 s."""


@pytest.fixture(scope="module")
def numbered_clip(ffmpeg, tmp_path_factory) -> Path:
    """10 s of numbered frames, lossless, and sound."""
    folder = tmp_path_factory.mktemp("numbered")
    bits = np.arange(N_FRAMES)[:, None] >> np.arange(8) & 1
    blocks = np.where(bits, 235, 16).astype(np.uint8).reshape(-1, 2, 4)
    blocks.repeat(SIZE // 2, 1).repeat(SIZE // 4, 2).tofile(folder / "grey")
    path = folder / "numbered.mkv"
    ffmpeg(
        "-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{SIZE}x{SIZE}", "-r", 25,
        "-i", folder / "grey", "-f", "lavfi", "-i", "sine=f=440:r=44100:d=10",
        "-c:v", "ffv1", "-pix_fmt", "yuv420p", "-c:a", "pcm_s16le", path,
    )  # fmt: skip
    return path


def numbers(images: list[np.ndarray] | np.ndarray) -> np.ndarray:
    """What is written in frames, of any size."""
    means = [
        block.mean()
        for image in images
        for row in np.array_split(image, 2)
        for block in np.array_split(row, 4, axis=1)
    ]
    return (np.reshape(means, (-1, 8)) > 125) @ (1 << np.arange(8))


def stored_and_shown(
    clip: Clip, shown: tuple[np.ndarray, np.ndarray], start_s: float = 0.0
) -> list[tuple[int, int]]:
    """The number of each stored frame, and of what ffmpeg shows at its time."""
    times_s, frames = shown
    at_s = start_s + np.array(clip.frame_ts_ms) / 1000
    ranks = np.searchsorted(times_s, at_s + 0.002, side="right") - 1
    stored = numbers(decode_jpegs(clip.frames))
    return list(zip(stored.tolist(), numbers(frames[ranks]).tolist(), strict=True))


@pytest.mark.parametrize("name", COUNTABLE | UNCOUNTABLE)
def test_a_frame_of_many_key_frames_is_the_one_of_its_time(
    name, numbered_clip, ffmpeg, ffmpeg_frames, tmp_path
):
    path = tmp_path / name
    ffmpeg("-i", numbered_clip, "-pix_fmt", "yuv420p", *(COUNTABLE | UNCOUNTABLE)[name], path)
    clip = extract(str(path), None, None, SPEC)
    pairs = stored_and_shown(clip, ffmpeg_frames(path))
    assert [stored - shown for stored, shown in pairs] == [0] * 8
    assert clip.decoder == ("decord" if name in COUNTABLE else "pyav")
    if name in UNCOUNTABLE:
        forced = SPEC.model_copy(update={"decoder": "decord"})
        with pytest.raises(Rejected) as caught:
            extract(str(path), None, None, forced)
        assert caught.value.reason == Reason.TIMELINE_UNCLEAN


@pytest.mark.parametrize("window_s", [(0.0, 2.0), (0.05, 2.0), (4.3, 6.3), (8.7, 10.0)])
def test_b_frames_in_avi_are_shown_in_windows_as_from_the_start(
    window_s, numbered_clip, ffmpeg, ffmpeg_frames, tmp_path
):
    """AVI stores no presentation times."""
    path = tmp_path / "h264.avi"
    ffmpeg("-i", numbered_clip, "-pix_fmt", "yuv420p", *UNCOUNTABLE[path.name], path)
    clip = extract(str(path), *window_s, SPEC)
    pairs = stored_and_shown(clip, ffmpeg_frames(path), window_s[0])
    assert [stored - shown for stored, shown in pairs] == [0] * 8


@pytest.mark.parametrize("gop", [25, 50, 150, 250])
def test_windows_of_a_transport_stream_lose_no_picture(
    gop, numbered_clip, ffmpeg, ffmpeg_frames, tmp_path
):
    """It has no index, and its first picture is decoded before the time it starts at."""
    path = tmp_path / "clip.ts"
    ffmpeg("-i", numbered_clip, "-pix_fmt", "yuv420p", *_H264, "-g", gop, path)
    shown = ffmpeg_frames(path)
    for start_s in (0.1, 0.5, 1.0, 1.5, 2.5, 4.5, 7.7):
        end_s = min(start_s + 3, 10)
        clip = extract(str(path), start_s, end_s, SPEC)
        pairs = stored_and_shown(clip, shown, start_s)
        assert [stored - shown for stored, shown in pairs] == [0] * 8
        assert clip.video_s == pytest.approx(end_s - start_s, abs=0.1)


def test_a_window_before_a_late_picture_has_the_sound_that_precedes_it(
    numbered_clip, ffmpeg, tmp_path
):
    """A seek in MP4 goes to the first picture, and sound before it is passed over."""
    prompt, path = tmp_path / "prompt.mp4", tmp_path / "late.mp4"
    ffmpeg("-i", numbered_clip, "-pix_fmt", "yuv420p", *_H264, "-t", "3", prompt)
    ffmpeg(
        "-itsoffset", "0.7", "-i", prompt, "-i", prompt, "-map", "0:v", "-map", "1:a",
        "-c", "copy", path,
    )  # fmt: skip
    clip = extract(str(path), 0.1, 2.0, SPEC)
    assert clip.audio_s == pytest.approx(1.9, abs=0.03)
    assert clip.video_s == pytest.approx(1.3, abs=0.05)


_FREEZES = {
    "after_three_seconds": ("if(lt(N,75),N,N+50)", 5.4),
    "after_one_second": ("if(lt(N,25),N,N+125)", 8.4),
    "before_the_last_picture": ("if(lt(N,84),N,N+50)", 5.4),
}
"""Times of 85 pictures in 25ths of a second, and when the last one ends."""


def _frozen(times: str) -> list[object]:
    return [
        "-vf", f"trim=end_frame=85,setpts='({times})/25/TB'", "-fps_mode", "passthrough",
        "-pix_fmt", "yuv420p", "-c:a", "aac", "-t", 9,
    ]  # fmt: skip


@pytest.mark.parametrize("freeze", _FREEZES)
@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("x264.mp4", ["-c:v", "libx264"]),
        ("x265.mp4", ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=0"]),
        ("no_b_frames.mp4", ["-c:v", "libx264", "-bf", "0"]),
        ("x264.mkv", ["-c:v", "libx264"]),
    ],
)
def test_a_picture_that_freezes_makes_the_clip_no_longer(
    name, codec, freeze, numbered_clip, ffmpeg, ffmpeg_frames, tmp_path
):
    """In MP4 the duration of a packet is the time to the next one that is decoded."""
    path = tmp_path / name
    times, end_s = _FREEZES[freeze]
    ffmpeg("-i", numbered_clip, *_frozen(times), *codec, path)
    clip = extract(str(path), None, None, SPEC)
    assert clip.video_s == pytest.approx(end_s, abs=0.002)
    times_s, frames = ffmpeg_frames(path)
    middles_s = (np.arange(8) + 0.5) * end_s / 8
    shown = frames[np.searchsorted(times_s, middles_s + 0.002, side="right") - 1]
    assert numbers(decode_jpegs(clip.frames)).tolist() == numbers(shown).tolist()


@pytest.mark.parametrize("b_frames", [0, 3])
def test_a_window_that_ends_in_a_freeze_is_shown_to_its_end(
    b_frames, numbered_clip, ffmpeg, tmp_path
):
    """What ends the freeze may lie past what is read for the window."""
    path = tmp_path / "frozen.mp4"
    times, _ = _FREEZES["after_three_seconds"]
    ffmpeg("-i", numbered_clip, *_frozen(times), "-c:v", "libx264", "-bf", b_frames, path)
    clip = extract(str(path), 0.0, 3.4, SPEC)
    assert clip.video_s == pytest.approx(3.4, abs=0.002)
    assert numbers(decode_jpegs(clip.frames)).tolist() == [5, 15, 26, 37, 47, 58, 69, 74]


@pytest.mark.parametrize(
    "name", ["one.mp4", "one.mkv", "one.webm", "one.ts", "one.m2ts", "one.mpg", "one.flv"]
)
def test_one_picture_with_sound_is_a_clip_in_every_container(name, numbered_clip, ffmpeg, tmp_path):
    """The cover of a piece of music. Of a stream of which it finds no end libavformat says that it
    lasts as long as the file."""
    codecs = {".webm": ["-c:v", "libvpx", "-c:a", "libopus"], ".mpg": UNCOUNTABLE["mpeg2.mpg"]}
    path = tmp_path / name
    ffmpeg(
        "-i", numbered_clip, "-pix_fmt", "yuv420p", *codecs.get(path.suffix, _H264),
        "-vf", "trim=end_frame=1", path,
    )  # fmt: skip
    clip = extract(str(path), None, None, SPEC)
    assert numbers(decode_jpegs(clip.frames)).tolist() == [0] * 8
    assert clip.audio_s == pytest.approx(10, abs=0.1)


def test_a_matroska_file_that_ends_before_its_tags_promise_is_refused(
    numbered_clip, ffmpeg, tmp_path
):
    path = tmp_path / "cut.mkv"
    ffmpeg("-i", numbered_clip, "-pix_fmt", "yuv420p", *_H264, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(Rejected) as caught:
        extract(str(path), None, None, SPEC)
    assert caught.value.reason in (Reason.AUDIO_SHORT, Reason.VIDEO_SHORT)
