"""One clip of a container to frames at presentation times.

Knows nothing of JPEG, sound, Ray or the store; runs in the decode child and imports no torch.
Invariant: the frames are those ffmpeg shows at the times stored with them; a clip of which less
can be shown than its container promises raises Rejected with a reason code.

Shapes: N frames, H = W = frame_size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from pipeline.config import FeatureSpec
from pipeline.decode.display import display_matrix, upright
from pipeline.decode.timeline import Timeline, Track
from pipeline.passing import OF_PROCESS
from pipeline.reasons import Reason, Rejected

FLAG_UNCLEAN = 1
"""The timeline has an edit list, negative or missing times, or a varying frame rate."""
FLAG_ROTATED = 2
"""A display matrix turned or mirrored the frames."""
FLAG_SILENT = 4
"""The sound is digital silence (rms < 1e-5)."""

# decord jumps between key frames but converts every frame it decodes; PyAV decodes all and converts
# those that are kept. Measured from 256x144 to 1280x720, decord takes 0.4-0.9x of PyAV's CPU where
# it decodes up to a quarter of the frames, 0.7-1.3x where half, and 1.0-1.7x where nearly all.
_DECORD_MOST_FRAC = 0.4
_SHORT_FRAC = 0.9
# A cut stream may begin with pictures that lean on what was cut off: the first one that can be
# shown may be this late.
_LATE_START_S = 1.0


@dataclass
class Frames:
    """N frames and the times they are shown from."""

    images_NHW3: list[np.ndarray]
    times_s: list[float]
    seconds: float
    """Presentable duration within the window."""
    width: int
    height: int
    fps: float
    codec: str
    decoder: str
    flags: int


def decode_frames(path: str, timeline: Timeline, spec: FeatureSpec) -> Frames:
    """Frames shown at t_i = (i + 0.5) * D / N, D the presentable duration within the window.

    Args: path: the local file the timeline was read from.
    Raises: Rejected (video_decode, video_short, too_few_frames, timeline_unclean).
    """
    shown = _Shown(timeline, spec.n_frames)
    if shown.seconds < spec.min_video_s or shown.seconds <= 0:
        raise Rejected(Reason.VIDEO_SHORT, f"{shown.seconds:.3f} s of picture in the window")
    images_NHW3 = _decode_by_jumps(path, timeline, shown, spec)
    if images_NHW3 is not None:
        decoder, times_s, is_turned = "decord", shown.expected_s.tolist(), False
    else:
        decoder = "pyav"
        images_NHW3, times_s, is_turned = _decode_with_pyav(timeline, shown, spec)
    stream = timeline.video.stream
    is_unclean = bool(timeline.unclean_because())
    return Frames(
        images_NHW3,
        times_s,
        shown.seconds,
        stream.width,
        stream.height,
        float(stream.average_rate or 0),
        stream.codec_context.codec.canonical_name,
        decoder,
        (FLAG_UNCLEAN if is_unclean else 0) | (FLAG_ROTATED if is_turned else 0),
    )


def _decode_by_jumps(
    path: str, timeline: Timeline, shown: "_Shown", spec: FeatureSpec
) -> list[np.ndarray] | None:
    """The frames by decord, or None where PyAV is asked for, is faster, or alone is right.

    Raises: Rejected if decord is asked for and cannot be trusted with the file.
    """
    if spec.decoder == "pyav":
        return None
    is_forced = spec.decoder == "decord"
    if because := timeline.uncountable_because():
        if is_forced:
            raise Rejected(Reason.TIMELINE_UNCLEAN, because)
        return None
    if not is_forced and shown.frac_decoded_by_jumps() >= _DECORD_MOST_FRAC:
        return None
    if _is_turned(timeline):
        if is_forced:
            raise Rejected(Reason.TIMELINE_UNCLEAN, "a display matrix turns or mirrors the frames")
        return None
    from pipeline.decode.decord_reader import decode_with_decord

    images_NHW3 = decode_with_decord(path, timeline, shown.ranks_N, spec)
    if images_NHW3 is None and is_forced:
        raise Rejected(Reason.VIDEO_DECODE, "decord met errors or counts other frames")
    return images_NHW3


def _is_turned(timeline: Timeline) -> bool:
    """Whether a display matrix, which only decoded frames tell of, turns or mirrors the first."""
    context = _single_threaded(timeline)
    first, end = timeline.video.packets[0], None
    try:
        frames = [frame for packet in (first, end) for frame in context.decode(packet)]
    except av.FFmpegError:
        return False
    finally:
        context.flush_buffers()
    return any(display_matrix(frame) is not None for frame in frames)


class _Shown:
    """Which presentation times are asked for, and which the packets promise there."""

    def __init__(self, timeline: Timeline, n_frames: int) -> None:
        video = timeline.video
        tick_s = video.tick_s
        order = np.argsort(video.pts, kind="stable")
        pts_s = np.asarray(video.pts)[order] * tick_s - timeline.window_origin_s
        step_s = video.step() * tick_s
        last_s = video.end_s() - timeline.window_origin_s
        length_s = timeline.end_s - timeline.start_s
        begin_s = min(max(float(pts_s[0]), 0.0), length_s)
        self.seconds = min(last_s, length_s) - begin_s
        self._refuse_cut_file(timeline, last_s)
        self.wanted_s = begin_s + (np.arange(n_frames) + 0.5) * self.seconds / n_frames
        self.ranks_N = np.searchsorted(pts_s, self.wanted_s + tick_s / 2, side="right") - 1
        self.ranks_N = np.maximum(self.ranks_N, 0)
        self.expected_s = pts_s[self.ranks_N]
        self.tolerance_s = max(1.5 * step_s, 2 * tick_s)
        is_key = np.array([packet.is_keyframe for packet in video.packets if not packet.is_discard])
        self._key_ranks = np.flatnonzero(is_key[order]) if len(is_key) == len(order) else [0]
        self._n_frames = len(order)

    def frac_decoded_by_jumps(self) -> float:
        """Share of the frames between the key frame before each rank and the rank itself."""
        ranks = np.unique(self.ranks_N)
        before = np.searchsorted(self._key_ranks, ranks, side="right") - 1
        keys = np.asarray(self._key_ranks)[np.maximum(before, 0)]
        reached = np.concatenate([[-1], ranks[:-1]])
        return float((ranks - np.maximum(keys - 1, reached)).sum() / self._n_frames)

    @staticmethod
    def _refuse_cut_file(timeline: Timeline, last_s: float) -> None:
        if last_s <= 0:
            begins, ends = f"{timeline.start_s:g} s", f"{timeline.start_s + last_s:.2f} s"
            raise Rejected(
                Reason.VIDEO_SHORT, f"the window begins at {begins}, the picture ends at {ends}"
            )
        declared_s = timeline.video.declared_end_s()
        if declared_s is None:
            return
        declared_s = min(declared_s - timeline.window_origin_s, timeline.end_s - timeline.start_s)
        if last_s < _SHORT_FRAC * declared_s:
            raise Rejected(
                Reason.VIDEO_SHORT,
                f"the picture ends at {last_s:.2f} s, the header promises {declared_s:.2f} s",
            )

    def check(self, times_s: list[float], first_shown_s: float) -> None:
        """Compare what was decoded with what the packets promise.

        Raises: Rejected.
        """
        n_expected, n_shown = len(np.unique(self.ranks_N)), len(set(times_s))
        late = [
            (wanted, shown)
            for wanted, expected, shown in zip(self.wanted_s, self.expected_s, times_s, strict=True)
            if abs(shown - expected) > self.tolerance_s
            and not (shown == first_shown_s and shown - expected < _LATE_START_S)
        ]
        if not late:
            return
        if n_shown < n_expected:
            raise Rejected(
                Reason.TOO_FEW_FRAMES,
                f"{n_shown} distinct frames could be decoded, {n_expected} are promised",
            )
        raise Rejected(
            Reason.VIDEO_DECODE,
            f"at {late[0][0]:.2f} s the nearest frame that decodes is of {late[0][1]:.2f} s",
        )


def _decode_with_pyav(
    timeline: Timeline, shown: _Shown, spec: FeatureSpec
) -> tuple[list[np.ndarray], list[float], bool]:
    """Decode in order and convert only the frames that are kept: the last one before each time.

    Returns: images, their times, and whether a display matrix turns or mirrors them.
    """
    reformatter = VideoReformatter()
    aspect = pixel_aspect(timeline.video.stream)
    half_tick_s = timeline.video.tick_s / 2
    images: list[np.ndarray] = []
    times_s: list[float] = []
    before: tuple[float, Any] | None = None
    first_s, is_turned = 0.0, False
    for time_s, frame in chain(frames_in_order(timeline), [(np.inf, None)]):
        if before is None:
            if frame is None:
                raise Rejected(Reason.VIDEO_DECODE, "no frame of the window could be decoded")
            first_s, is_turned = time_s, display_matrix(frame) is not None
        else:
            n_passed = int(np.searchsorted(shown.wanted_s, time_s - half_tick_s))
            n_here = n_passed - len(images)
            if n_here > 0:
                images += [to_square(before[1], reformatter, aspect, spec)] * n_here
                times_s += [before[0]] * n_here
            if n_passed == spec.n_frames:
                break
        before = time_s, frame
    shown.check(times_s, first_s)
    return images, times_s, is_turned


def frames_in_order(timeline: Timeline) -> Iterator[tuple[float, Any]]:
    """Presentable frames with their time within the window, in order of presentation.

    Raises: Rejected if the decoder fails after the first frame (before it, packets may lean on
    what was cut off).
    """
    video, context = timeline.video, _single_threaded(timeline)
    n_frames, before = 0, None
    for packet in (*video.packets, None):
        try:
            frames = context.decode(packet)
        except av.FFmpegError as error:
            if n_frames:
                lacks = error.errno in OF_PROCESS
                raise Rejected(
                    Reason.WORKER_DIED if lacks else Reason.VIDEO_DECODE,
                    f"after {n_frames} frames: {error.strerror}",
                ) from error
            continue
        for frame in frames:
            time = _presented_at(frame, video, before)
            if time is None:
                raise Rejected(Reason.VIDEO_DECODE, "a frame has no presentation time")
            n_frames, before = n_frames + 1, time
            # Not frame.time: frames that the end of the stream flushes out have no time base.
            yield time * video.tick_s - timeline.window_origin_s, frame


def _single_threaded(timeline: Timeline) -> Any:
    """The decoder of the timeline's packets, on the caller's thread alone."""
    context = timeline.video.stream.codec_context
    if not context.is_open:
        context.thread_count = 1
        context.thread_type = "NONE"
    return context


def _presented_at(frame: Any, video: Track, before: float | None) -> float | None:
    """Ticks at which a frame is shown, after one that is shown at `before`; None if unknown."""
    pts: float | None = frame.pts
    dts: float | None = frame.dts
    if not video.is_timed_by_dts:
        return pts
    if dts is None and before is not None:
        # The end of the stream flushed it out, with no packet.
        return before + video.step()
    return pts if dts is None else dts


def pixel_aspect(stream: Any) -> float:
    """Width of a pixel over its height; 1 if the stream does not say, or says nonsense."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.1 < aspect < 10 else 1.0


def scaled_size(width: int, height: int, aspect: float, spec: FeatureSpec) -> tuple[int, int]:
    """Width and height before cropping, for pixels that are `aspect` times as wide as high."""
    if spec.resize == "squash":
        return spec.frame_size, spec.frame_size
    shown_width = width * aspect
    scale = spec.frame_size / min(shown_width, height)
    return (
        max(spec.frame_size, round(shown_width * scale)),
        max(spec.frame_size, round(height * scale)),
    )


def centre_square(image_hw3: np.ndarray, size: int) -> np.ndarray:
    """The middle [size, size, 3] of an image."""
    top = (image_hw3.shape[0] - size) // 2
    left = (image_hw3.shape[1] - size) // 2
    return image_hw3[top : top + size, left : left + size]


def to_square(
    frame: Any, reformatter: VideoReformatter, aspect: float, spec: FeatureSpec
) -> np.ndarray:
    """One decoded frame as the stored RGB square: aspect and display matrix applied.

    Raises: Rejected if the decoder flagged the frame as damaged.
    """
    if frame.is_corrupt:
        raise Rejected(Reason.VIDEO_DECODE, f"a frame (pts {frame.pts}) is damaged")
    width, height = scaled_size(frame.width, frame.height, aspect, spec)
    # Bilinear, as decord scales, so that pictures hardly depend on which of the two made them.
    small = reformatter.reformat(
        frame, width=width, height=height, format="rgb24", interpolation="BILINEAR", threads=1
    )
    return centre_square(upright(small.to_ndarray(), display_matrix(frame)), spec.frame_size)
