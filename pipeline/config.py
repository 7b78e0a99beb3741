"""What a feature is (FeatureSpec and its hash) and how an ingest runs (IngestConfig).

Pure pydantic models: imports nothing heavy, so that `--help` answers at once.
Invariant: every field of FeatureSpec changes the stored features or which clips are accepted, and
no field of IngestConfig changes features; so equal `spec_hash` means equal features. Some fields of
IngestConfig turn clips down: for what is in them (`leave_out`, which is written into the commit),
or until they get more room or time (`max_clip_bytes`, `child_memory_mb`, `timeout_s`).
"""

import hashlib
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.reasons import Reason

FRAME_LENGTH_MS = 25.0
FRAME_SHIFT_MS = 10.0
LEASE_STALE_S = 60.0
"""Silence after which a writer is taken for dead, of leases that no config sets otherwise. Longer
than `pipeline/patience.py` repeats a write; `scale.lease_stale_s` begins with it, too."""


class Frozen(BaseModel):
    """Immutable config: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class FeatureSpec(Frozen):
    """What the features of a clip are. Another spec makes every clip be decoded again."""

    n_frames: int = Field(10, ge=1, le=1000)
    """Frames per clip, at the middles of equal parts of its presentable duration."""
    frame_size: int = Field(224, ge=16, le=2048)
    """Side of the stored square frames, in pixels."""
    resize: Literal["crop", "squash"] = "crop"
    """`crop`: short side to frame_size, then the centre square; `squash`: ignore the aspect."""
    jpeg_quality: int = Field(95, ge=1, le=100)
    """JPEG quality of the stored frames (4:2:0)."""
    sample_rate_hz: int = Field(16000, ge=4000, le=96000)
    """Sample rate of the waveform the fbank is made from."""
    n_mels: int = Field(128, ge=8, le=512)
    """Mel bins of the Kaldi fbank."""
    fbank_frames: int = Field(1024, ge=8)
    """Rows of the stored fbank (10 ms each): longer is cut, shorter is padded with zeros."""
    duration_s: float = Field(10.0, gt=0, le=600)
    """At most this much of a clip is used."""
    audio_channel: Literal["mean", "first"] = "mean"
    """Mean of the channels, or the first one as CAV-MAE takes it."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """`auto`: decord for MP4 and Matroska with a clean timeline of many key frames, each the start
    of what is shown after it, else PyAV; a store made on a machine without decord (aarch64) says
    `pyav`. A forced `decord` fails all other clips."""
    min_audio_s: float = Field(0.5, ge=0.025)
    """Clips with less sound than this fail with `audio_short`."""
    min_video_s: float = Field(0.0, ge=0)
    """Clips with less picture than this fail with `video_short`."""
    max_clip_s: float = Field(600.0, gt=0)
    """A file that lasts longer and has no time window fails with `too_long`."""
    version: int = Field(3, ge=1)
    """Raised when the code that computes features changes what it computes. 2: frames that are
    those of their times in every container. 3: a picture that freezes makes no clip longer;
    windows of MPEG-PS have their sound in time."""

    def spec_hash(self) -> str:
        """16 hex digits that are equal exactly for equal specs."""
        return self.hash_of(self.canonical_json().encode())

    @staticmethod
    def hash_of(canonical_json: bytes) -> str:
        """The `spec_hash` of a spec that was written down, perhaps by another version."""
        return hashlib.sha256(canonical_json).hexdigest()[:16]

    def canonical_json(self) -> str:
        """The spec as JSON, fields in order of declaration, no spaces."""
        return self.model_dump_json()


class IngestConfig(Frozen):
    """How an ingest runs; changes nothing of what is stored of a clip."""

    extractor: ClassVar[str] = "pipeline.decode.clip:extract"
    """What the decode child runs, `module:function`. No field: another one makes other features."""

    shard_clips: int = Field(256, ge=1, le=4096)
    """Most clips in one shard, the unit of retry."""
    workers: int | None = Field(None, ge=1)
    """Most decode actors; None: one per CPU that the cluster has or gets, or on a machine alone per
    core that this process may use (`taskset` and the quota of a container count)."""
    local_clips: int | None = Field(None, ge=0)
    """Up to this many clips are decoded by processes of this machine, and Ray is never started; 0
    leaves every clip to Ray. None: 64 beside a cluster, 1,024 on a machine alone."""
    cpus_per_worker: float = Field(0.9, gt=0)
    """CPUs an actor reserves; below 1 so that Ray Data's own tasks always find room."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest time one clip may take in the decode child."""
    child_clips: int = Field(500, ge=1)
    """The decode child is replaced after this many clips."""
    child_memory_mb: int = Field(1024, ge=128)
    """A decode child above this resident size is replaced; its clip fails when it is still busy."""
    max_clip_bytes: int = Field(4 << 30, ge=1)
    """A clip that has to be copied to this machine first (of an object store, of a tar part) and is
    larger fails with `too_large`, and is tried again by a run that allows its size; local files are
    read where they lie."""
    prefetch: int = Field(4, ge=0, le=64)
    """Remote clips an actor downloads ahead of the decoder."""
    commit_shards: int = Field(8, ge=1)
    """Finished shards that are committed together."""
    commit_seconds: float = Field(60.0, gt=0)
    """Finished shards wait no longer than this for their commit."""
    stall_timeout_s: float = Field(900.0, gt=0)
    """The run stops with an error when no clip was finished for this long."""
    fingerprint: Literal["stat", "sha256"] = "stat"
    """`stat`: size and mtime (etag on object stores); `sha256`: content of files, and of clips in
    tar parts, on this machine's file system; read only when the stat changed, so that a mere touch
    of what was decoded with it costs a hash instead of a decode. On object stores: the etag."""
    retry_failed: bool = False
    """Decode clips again that failed before."""
    retry_reasons: tuple[Reason, ...] = ()
    """Like retry_failed, for these reason codes only."""
    max_failed_frac: float = Field(0.10, ge=0, le=1)
    """Above this share of failed decodes the run ends with exit code 3 (after committing): of the
    clips it decodes for the first time, or of 100 clips of the store where those are fewer. Clips
    that are tried again and fail again do not count. Another spec is not put in force above this
    share of all its clips."""
    max_removed_frac: float = Field(0.20, ge=0, le=1)
    """Above this share of vanished clips (of those in the store, and of two or more of those to
    decode while they are decoded) the source is taken for unmounted; 1 lets all go, which is what
    --allow-mass-delete makes of it for one run."""
    leave_out: tuple[str, ...] = ()
    """Rules of `diccae store quality` (such as still, duplicate): clips that hit one, and whose
    file is still the one that was looked at, count as not listed."""
    lease_stale_s: float = Field(LEASE_STALE_S, gt=1)
    """A writer that was silent for this long is taken for dead."""
