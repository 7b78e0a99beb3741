"""Why a clip was turned down: the reason codes of the clips table.

Knows nothing of how they are found. Invariant: a code, once stored, keeps its meaning.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Reason codes of failed clips."""

    MISSING = "missing"
    OPEN_FAILED = "open_failed"
    NO_VIDEO = "no_video"
    NO_AUDIO = "no_audio"
    VIDEO_DECODE = "video_decode"
    AUDIO_DECODE = "audio_decode"
    AUDIO_SHORT = "audio_short"
    VIDEO_SHORT = "video_short"
    TOO_FEW_FRAMES = "too_few_frames"
    TOO_LONG = "too_long"
    TOO_LARGE = "too_large"
    TIMELINE_UNCLEAN = "timeline_unclean"
    TIMEOUT = "timeout"
    WORKER_DIED = "worker_died"
    IO_ERROR = "io_error"


PASSING = (Reason.TIMEOUT, Reason.WORKER_DIED, Reason.IO_ERROR)
"""Reasons that may not be the clip's fault: such a clip is tried once more by the next run."""


class Rejected(Exception):
    """A clip that gives no features, with its reason code."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail[:500]
