"""Clips as local files, with the fingerprint of the bytes that are really read.

Knows nothing of decoding. Invariant: the fingerprint a clip is stored with is that of the bytes it
was decoded from, also when its file is replaced meanwhile.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import IngestConfig
from pipeline.passing import OF_PROCESS, OF_STORAGE
from pipeline.patience import open_filesystem
from pipeline.reasons import Reason, Rejected
from pipeline.scratch import scratch_file, told_if_full
from pipeline.source.files import (
    File,
    local_file,
    member_file,
    part_file,
    remote_file,
    sha256_of,
)
from pipeline.source.tar_parts import SEPARATOR, part_of, stream_members
from pipeline.storage import is_refusal, is_storage_failure

_MOST_DOWNLOADS = 3
_MOST_PROBES = 5


@dataclass
class Fetched:
    """A clip and where its bytes lie now."""

    clip: dict[str, Any]
    """Row of a plan's todo; its fingerprint follows the file."""
    path: str
    rejected: Rejected | None = None
    is_temporary: bool = False
    is_shared: bool = False
    """The clip that comes next lies in the same temporary file."""
    hashes_content: bool = False
    beside: list[dict[str, Any]] = field(default_factory=list)
    """The clips that it is fetched with."""

    def changed(self) -> bool:
        """Whether the file was replaced since its fingerprint was taken, which is then renewed;
        that of a temporary one was when it was made.

        Raises: Rejected if it vanished.
        """
        if self.is_temporary:
            return False
        try:
            now = local_file(self.path, os.stat(self.path))
        except FileNotFoundError:
            raise Rejected(Reason.MISSING, "the file vanished while it was read") from None
        if (now.size, now.mtime_ns) == (self.clip["size"], self.clip["mtime_ns"]):
            return False
        _describe(self.clip, now)
        if self.hashes_content:
            self.clip |= {"fp": sha256_of(self.path), "fp_kind": "sha256"}
        return True

    def refuse_lost_storage(self, told: str) -> None:
        """Asked of a clip that cannot be read. Raises: OSError if others cannot be read either: it
        is not the clip then."""
        if not _others_open(self.clip, self.beside):
            raise OSError(f"{self.clip['uri']} cannot be read ({told}), nor can others beside it")

    def release(self) -> None:
        """Delete a temporary file, if this is the last clip of it."""
        if self.is_temporary and not self.is_shared:
            Path(self.path).unlink(missing_ok=True)


def fetch_all(clips: list[dict[str, Any]], config: IngestConfig) -> Iterator[Fetched]:
    """Clips as local files: of one tar part in the order they stand there, others as given.

    Each is released before the next one is drawn.
    """
    part = part_of(clips[0]["uri"]) if clips else None
    return _fetch_part(part, clips, config) if part else _fetch_files(clips, config)


def _too_large(clip: dict[str, Any], config: IngestConfig) -> Rejected | None:
    """Whether a clip would have to be copied here and is larger than may be."""
    if clip["size"] is None or clip["size"] <= config.max_clip_bytes:
        return None
    return Rejected(
        Reason.TOO_LARGE,
        f"{clip['size']:,} bytes to copy, more than ingest.max_clip_bytes = "
        f"{config.max_clip_bytes:,}",
    )


def _fetch_part(part: str, clips: list[dict[str, Any]], config: IngestConfig) -> Iterator[Fetched]:
    by_member: dict[str, list[dict[str, Any]]] = {}
    for clip in clips:
        if (rejected := _too_large(clip, config)) is not None:
            yield Fetched(clip, "", rejected)
        else:
            # Windows of an untrimmed video are clips of one member.
            by_member.setdefault(clip["uri"].removeprefix(part + SEPARATOR), []).append(clip)
    hashes = config.fingerprint == "sha256" and is_on_this_machine(part)
    # Before it is opened: if it is replaced in between, the next listing finds another one.
    now = part_file(part)
    for member, path in stream_members(part, set(by_member)):
        *others, last = by_member.pop(member)
        for clip in (*others, last):
            _describe_member(clip, member_file(clip["uri"], os.path.getsize(path), now))
        if hashes:
            content = {"fp": sha256_of(path), "fp_kind": "sha256"}
            for clip in (*others, last):
                clip |= content
        try:
            for clip in others:
                yield Fetched(clip, path, is_temporary=True, is_shared=True)
        except GeneratorExit:
            # Whoever stops here has not been given the clip that deletes the file.
            Path(path).unlink(missing_ok=True)
            raise
        yield Fetched(last, path, is_temporary=True)
    for clip in itertools.chain.from_iterable(by_member.values()):
        rejected = Rejected(Reason.MISSING, f"{part} is damaged before this clip")
        yield Fetched(clip, "", rejected, is_temporary=False)


def _fetch_files(clips: list[dict[str, Any]], config: IngestConfig) -> Iterator[Fetched]:
    """Remote clips are downloaded ahead, `config.prefetch` at a time."""
    with ThreadPoolExecutor(max(1, config.prefetch)) as pool:
        ahead: deque[Future[Fetched]] = deque()
        try:
            for clip in clips:
                if is_local_file(clip["uri"]):
                    here = _local(clip, clips, config)
                    ahead.append(Future())
                    ahead[-1].set_result(here)
                else:
                    ahead.append(pool.submit(_download, clip, clips, config))
                if len(ahead) > config.prefetch:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                if future.exception() is None:
                    future.result().release()


def is_local_file(uri: str) -> bool:
    """Whether a clip is a file of its own on this machine's file system."""
    return part_of(uri) is None and is_on_this_machine(uri)


def is_on_this_machine(uri: str) -> bool:
    """Whether a clip, or the tar part it lies in, is a file on this machine's file system. Only
    there has it a time beside its content hash, which tells that it was not touched; a hash in the
    place of an etag would leave nothing to tell that by."""
    return "://" not in uri or uri.startswith("file://")


def _local(clip: dict[str, Any], clips: list[dict[str, Any]], config: IngestConfig) -> Fetched:
    """A clip where it lies; `clips` are those it is fetched with.

    Raises: OSError if neither it nor any of them can be read.
    """
    path = clip["uri"].removeprefix("file://")
    fetched = Fetched(clip, path, hashes_content=config.fingerprint == "sha256", beside=clips)
    try:
        if fetched.hashes_content:
            clip |= {"fp": _hashed(path), "fp_kind": "sha256"}
    except FileNotFoundError:
        fetched.rejected = Rejected(Reason.MISSING, "the file vanished before it was read")
    except OSError as error:
        told, reason = error.strerror or str(error), Reason.OPEN_FAILED
        if error.errno in OF_STORAGE | OF_PROCESS:
            fetched.refuse_lost_storage(told)
            reason = Reason.IO_ERROR
        fetched.rejected = Rejected(reason, told)
    return fetched


def _hashed(path: str) -> str:
    """As sha256_of, twice if storage fails: a mount may do so once."""
    try:
        return sha256_of(path)
    except OSError as error:
        if error.errno not in OF_STORAGE:
            raise
        return sha256_of(path)


def _download(clip: dict[str, Any], clips: list[dict[str, Any]], config: IngestConfig) -> Fetched:
    """A local copy of a clip; `clips` are those it is fetched with."""
    if (rejected := _too_large(clip, config)) is not None:
        return Fetched(clip, "", rejected)
    fs, remote = open_filesystem(clip["uri"])
    handle, path = scratch_file(os.path.splitext(remote)[1])
    os.close(handle)
    fetched = Fetched(clip, path, is_temporary=True)
    try:
        for _ in range(_MOST_DOWNLOADS):
            with told_if_full(os.path.dirname(path)):
                fs.get_file(remote, path)
            now = remote_file(clip["uri"], fs.info(remote))
            if now.fp == clip["fp"]:
                break
            _describe(clip, now)
        else:
            fetched.rejected = Rejected(Reason.OPEN_FAILED, "the object keeps changing")
    except FileNotFoundError:
        fetched.rejected = Rejected(Reason.MISSING, "the object vanished before it was read")
    except Exception as error:
        # What is no failure of the storage is about this one clip, such as what its name makes of
        # a library; unless the library says so of all: it may be one we do not know.
        is_of_clip = is_refusal(error) or not is_storage_failure(error)
        if not is_of_clip or not _others_open(clip, clips):
            fetched.release()
            raise
        fetched.rejected = Rejected(Reason.OPEN_FAILED, str(error))
    return fetched


def _others_open(clip: dict[str, Any], clips: list[dict[str, Any]]) -> bool:
    """Whether any of a few other files may be read: keys that expired deny them all, a mount that
    is away gives none, and neither is a reason to quarantine anything. True if there is no other.
    """
    others = [one["uri"] for one in clips if one["uri"] != clip["uri"]][:_MOST_PROBES]
    return not others or any(map(_opens, others))


def _opens(uri: str) -> bool:
    fs, remote = open_filesystem(uri)
    try:
        fs.cat_file(remote, 0, 1)
    except Exception:
        return False
    return True


def _describe_member(clip: dict[str, Any], now: File) -> None:
    """A hash of the content stays that of the clip while its part has the size and time it had."""
    stat = now.size, now.mtime_ns
    if clip["fp_kind"] != "sha256" or stat != (clip["size"], clip["mtime_ns"]):
        _describe(clip, now)


def _describe(clip: dict[str, Any], file: File) -> None:
    clip.update(fp=file.fp, fp_kind=file.fp_kind, size=file.size, mtime_ns=file.mtime_ns)
