"""same_content: clips whose file looks like another one now and has the content the store knows.

Reads files and tar parts of this machine whole; knows nothing of plans. Invariant: a file is read
once, however many clips are windows of it.
"""

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.cores import usable_cores
from pipeline.ingest.plan import content_known
from pipeline.side_by_side import side_by_side
from pipeline.source.fetch import is_on_this_machine
from pipeline.source.files import sha256_of
from pipeline.source.pace import Pace
from pipeline.source.tar_parts import SEPARATOR, hash_members, part_of

_LOG = logging.getLogger(__name__)


def same_content(sources: pa.Table, states: pa.Table) -> set[str]:
    """Clips whose file, or tar part, is only younger. Args: as make_plan."""
    _warn_of_etags(sources)
    by_file: dict[str, list[dict[str, Any]]] = {}
    for clip in content_known(sources, states).to_pylist():
        if is_on_this_machine(clip["uri"]):
            by_file.setdefault(clip["uri"], []).append(clip)
    # Of a file that is gone no size is known.
    found = _hashes({uri: clips[0]["size"] or 0 for uri, clips in by_file.items()})
    return {
        clip["clip_id"]
        for uri, clips in by_file.items()
        for clip in clips
        if clip["known_hash"] == found.get(uri)
    }


def _warn_of_etags(sources: pa.Table) -> None:
    uris = [uri for uri in sources["uri"].to_pylist() if not is_on_this_machine(uri)]
    if uris:
        _LOG.warning(
            "%d of %d clips (such as %s) are told by size and etag: ingest.fingerprint sha256 "
            "counts for files and tar parts of this machine; copy them here, or leave it out",
            len(uris), len(sources), uris[0],
        )  # fmt: skip


def _hashes(sizes: dict[str, int]) -> dict[str, str]:
    """SHA-256 of files by URI; one that cannot be read has none. Args: sizes: bytes by URI."""
    alone: list[str] = []
    by_part: dict[str, list[str]] = {}
    for uri in sizes:
        part = part_of(uri)
        (by_part.setdefault(part, []) if part else alone).append(uri)
    reader = _Reader(Pace("comparing the content of touched files", sum(sizes.values())), sizes)
    cores = usable_cores()
    # Hashing and decompression run outside the interpreter's lock.
    found = {uri: hashed for uri, hashed in side_by_side(reader.file, alone, 2 * cores) if hashed}
    with ThreadPoolExecutor(min(len(by_part), cores) or 1) as pool:
        for members in pool.map(reader.members, by_part, by_part.values()):
            found.update(members)
    return found


class _Reader(NamedTuple):
    """Hashes files. One that cannot be read is left to the decoder, which says why of each clip."""

    pace: Pace
    sizes: dict[str, int]

    def file(self, uri: str) -> tuple[str, str | None]:
        """A file and its hash."""
        hashed = None
        with contextlib.suppress(OSError):
            hashed = sha256_of(uri)
        self.pace.read(self.sizes[uri])
        return uri, hashed

    def members(self, part: str, uris: list[str]) -> dict[str, str]:
        """The hashes of members of one tar part, by URI."""
        wanted = {uri.removeprefix(part + SEPARATOR) for uri in uris}
        found: dict[str, str] = {}
        with contextlib.suppress(OSError):
            for member, hashed in hash_members(part, wanted):
                uri = f"{part}{SEPARATOR}{member}"
                found[uri] = hashed
                self.pace.read(self.sizes[uri])
        return found
