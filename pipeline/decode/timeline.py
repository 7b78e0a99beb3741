"""What a container says of a clip, without decoding: packets, presentation times, cleanliness.

Knows nothing of pixels or samples. Invariant: time 0 of a clip is the start time of its
container, the first presentable picture or sound, as ffmpeg has it; times are seconds from there.

A clip cut with `ffmpeg -ss ... -c copy` starts with packets that an edit list discards (negative
pts, DISCARD flag). decord and OpenCV count them as frames and are seconds off; hence `is_clean`.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np

from pipeline.reasons import Reason, Rejected

_SEEKS_BACK_S = (1.0, 5.0, 20.0)
# Streams are interleaved: packets of one may follow this much later than those of the other. It
# also lets a clip that is a little longer than the window be read whole.
_INTERLEAVE_S = 1.5
# What libavformat calls the containers that index every frame. In the others decord's jumps land on
# other frames than it counts, by seconds: MPEG-PS and -TS have no index, ASF one by time, AVI no
# presentation times. FLV's is made while it is read.
_MATROSKA = "matroska,webm"
_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", _MATROSKA)
_WITHOUT_HEADER = ("mpegts", "mpeg")
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")


@dataclass
class Track:
    """Packets of one stream in decoding order, those of the window and what they depend on."""

    stream: Any
    packets: list[Any] = field(default_factory=list)
    pts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    n_discarded: int = 0
    n_without_pts: int = 0
    tick_s: float = field(init=False)
    """Seconds per tick of this stream."""
    is_timed_by_dts: bool = field(init=False)
    """The pts are made up, and ffmpeg shows a frame at the dts of the packet it comes out with: AVI
    stores no times, and with B-frames the made-up ones run backwards."""

    def __post_init__(self) -> None:
        # Not a Fraction: arithmetic with those took a third of the probe.
        self.tick_s = float(self.stream.time_base)
        is_avi = self.stream.container.format.name == "avi"
        self.is_timed_by_dts = is_avi and self.stream.type == "video"

    def add(self, packet: Any) -> None:
        """Take a packet in; its times count only if it is presented.

        Nothing before the first key frame can be decoded: such packets are left out.
        """
        if not self.packets and not packet.is_keyframe:
            return
        self.packets.append(packet)
        if packet.is_discard:
            self.n_discarded += 1
            return
        if packet.pts is None:
            self.n_without_pts += 1
        pts = self._ticks(packet)
        if pts is not None:
            self.pts.append(pts)
            self.ends.append(pts + (packet.duration or 0))

    def _ticks(self, packet: Any) -> int | None:
        """When a packet is presented, as far as the container says."""
        ticks: int | None = packet.pts
        return packet.dts if ticks is None or self.is_timed_by_dts else ticks

    def step(self) -> float:
        """Ticks from a presentable packet to the next one, as a rule; 0 if there is but one."""
        return float(np.median(np.diff(np.sort(self.pts)))) if len(self.pts) > 1 else 0.0

    def start_s(self) -> float:
        """Container time of the first presentable packet."""
        return min(self.pts) * self.tick_s

    def decodable_from_s(self) -> float:
        """Container time of the first packet, a key frame: what is shown before it leans on what
        is lacking, though in an open GOP it is decoded later."""
        ticks = self._ticks(self.packets[0])
        return (min(self.pts) if ticks is None else ticks) * self.tick_s

    def end_s(self) -> float:
        """Container time at which the last picture shown ends: by its duration, or after a step.

        In MP4 a packet's duration is the time to the next one that is decoded: where pictures are
        reordered, that of a long picture stands at another one. What ends before the last picture
        does not count, nor does what would end after the header's end.
        """
        last = max(self.pts)
        own_s = max(e for p, e in zip(self.pts, self.ends, strict=True) if p == last) * self.tick_s
        declared_s = self.declared_end_s()
        if declared_s is not None:
            own_s = min(own_s, declared_s)
        return max(own_s, (last + self.step()) * self.tick_s)

    def seconds_between(self, begin_s: float, end_s: float) -> float:
        """How much of this stretch of container time the presentable packets cover."""
        pts_s, ends_s = np.asarray(self.pts) * self.tick_s, np.asarray(self.ends) * self.tick_s
        overlaps_s = np.minimum(ends_s, end_s) - np.maximum(pts_s, begin_s)
        return float(np.maximum(overlaps_s, 0).sum())

    def declared_end_s(self) -> float | None:
        """Container time at which the header says that the stream ends, if it says so.

        What libavformat has of a stream may be of the whole file: in Matroska a tag knows better,
        and MPEG-TS and -PS have no header that could promise anything.
        """
        stream, name = self.stream, self.stream.container.format.name
        told = _CLOCK.fullmatch(stream.metadata.get("DURATION", ""))
        if stream.duration is not None and not (told and name == _MATROSKA):
            if name in _WITHOUT_HEADER:
                return None
            return float((stream.start_time or 0) + stream.duration) * self.tick_s
        if told is None:
            return None
        hours, minutes, seconds = told.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


@dataclass
class Timeline:
    """A clip's two tracks over a window of time."""

    video: Track
    audio: Track
    origin_s: float
    """Container time of the clip's time 0."""
    start_s: float
    """Start of the window, from time 0."""
    end_s: float
    """End of the window, from time 0."""
    is_whole: bool
    """The tracks hold every packet of the file."""

    @property
    def window_origin_s(self) -> float:
        """Container time at which the window starts."""
        return self.origin_s + self.start_s

    def unclean_because(self) -> str:
        """Why a decoder that counts frames could err here; empty if it could not."""
        video = self.video
        n_declared = video.stream.frames if self.is_whole else 0
        if video.n_discarded:
            return f"{video.n_discarded} packets are discarded by an edit list"
        if video.n_without_pts:
            return f"{video.n_without_pts} packets have no presentation time"
        if min(video.pts) < 0:
            return "presentation times are negative"
        if n_declared and n_declared != len(video.pts):
            return f"the header says {n_declared} frames, there are {len(video.pts)} packets"
        # Past the window, packets that are decoded later but shown earlier may be lacking.
        shown = np.sort(video.pts)
        shown = shown[shown * video.tick_s < self.origin_s + self.end_s]
        steps = np.diff(shown)
        if len(steps) and (
            steps.min() <= 0 or abs(steps - np.median(steps)).max() > _jitter(steps)
        ):
            return "the frame rate varies"
        return ""

    def uncountable_because(self) -> str:
        """Why a decoder that jumps by counting frames could err here; empty if it could not."""
        video = self.video
        if not self.is_whole:
            return "the clip is a part of its file"
        if because := self.unclean_because():
            return because
        container = video.stream.container.format.name
        if container not in _INDEXED:
            return f"{container} has no index of frames"
        # After a jump decord counts from the key frame on as if it were the first one shown, but
        # pictures that lean on an open GOP's neighbour are decoded after the key frame and shown
        # before. A clean timeline has a time for each packet.
        ranks_are_off = np.argsort(video.pts, kind="stable") != np.arange(len(video.pts))
        if ranks_are_off[[packet.is_keyframe for packet in video.packets]].any():
            return "pictures are shown before the key frame that they are decoded after"
        return ""


def _jitter(steps: np.ndarray) -> float:
    """Ticks a step of a constant frame rate may be off: 1 %, or the rounding of a coarse clock."""
    return max(1.0, 0.01 * float(np.median(steps)))


def read_timeline(container: Any, start_s: float, duration_s: float) -> Timeline:
    """Demux the packets that show and sound in [start_s, start_s + duration_s) of the clip.

    Raises: Rejected (no_video, no_audio); av.FFmpegError from a damaged container.
    """
    video = Track(_first_real_video(container))
    if not container.streams.audio:
        raise Rejected(Reason.NO_AUDIO, "the file has no audio stream")
    audio = Track(container.streams.audio[0])
    origin_s = (container.start_time or 0) / av.time_base
    end_s = origin_s + start_s + duration_s
    if start_s == 0:
        reached_end = _collect(container, video, audio, end_s)
    else:
        reached_end = False
        video, audio = _collect_from(container, video, audio, origin_s, start_s, end_s)
    for track, reason in ((video, Reason.NO_VIDEO), (audio, Reason.NO_AUDIO)):
        if not track.pts:
            raise Rejected(reason, f"the {track.stream.type} stream has no packets in the window")
    return Timeline(video, audio, origin_s, start_s, start_s + duration_s, reached_end)


def _first_real_video(container: Any) -> Any:
    for stream in container.streams.video:
        # Cover art is a video stream of one picture.
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise Rejected(Reason.NO_VIDEO, "the file has no video stream")


def _collect_from(
    container: Any, video: Track, audio: Track, origin_s: float, start_s: float, end_s: float
) -> tuple[Track, Track]:
    """The tracks from a key frame at or before start_s on; from the first packet if there is none.

    Containers without an index seek to any packet: go back further until a key frame is there.
    """
    for back_s in _SEEKS_BACK_S:
        target_s = origin_s + max(0.0, start_s - back_s)
        try:
            container.seek(int(target_s * av.time_base), backward=True)
        except av.FFmpegError:
            continue  # In some places of an MPEG-PS with AC-3, where further back it can.
        video, audio = Track(video.stream), Track(audio.stream)
        _collect(container, video, audio, end_s)
        if video.pts and audio.pts:
            begin_s = max(video.decodable_from_s(), audio.start_s()) - origin_s
            if begin_s <= start_s:
                return video, audio
    # By opening the file again. A seek to time 0 passes over what is decoded before it, and without
    # an index that is the first picture and all up to the next key frame; a seek to before it is
    # refused for AVI, and in MP4 leaves out the sound that comes before a late picture. The streams
    # of the tracks keep the container open.
    container = av.open(container.name, metadata_errors="replace")
    video = Track(container.streams[video.stream.index])
    audio = Track(container.streams[audio.stream.index])
    _collect(container, video, audio, end_s)
    return video, audio


def _collect(container: Any, video: Track, audio: Track, end_s: float) -> bool:
    """Fill the tracks up to container time end_s or later. Returns whether the file ended there."""
    tracks = {video.stream.index: video, audio.stream.index: audio}
    for packet in container.demux(video.stream, audio.stream):
        if packet.size == 0:
            continue
        track = tracks[packet.stream.index]
        track.add(packet)
        # Nothing decoded later is presented before its own dts.
        clock = packet.dts if packet.dts is not None else packet.pts
        if clock is not None and clock * track.tick_s - end_s > _INTERLEAVE_S:
            return False
    return True
