"""lost_bytes_frac: how much of a media file is cut off, by the sizes its own boxes promise.

Reads headers only, a few bytes of each; knows nothing of FFmpeg. Invariant: a file whose layout is
not known, or says nothing of sizes, has lost nothing here.
"""

import os
from typing import BinaryIO

_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"sidx", b"uuid", b"styp")
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"


def lost_bytes_frac(path: str) -> float:
    """Share of the promised bytes that the file does not hold, in [0, 1].

    MP4 and MOV (top-level boxes), Matroska and WebM (the segment) and AVI (the RIFF chunk) are
    known. 1.0 for an empty file, and for an MP4 that ends before its table of contents.
    """
    size = os.path.getsize(path)
    if size == 0:
        return 1.0
    with open(path, "rb") as file:
        head = file.read(12)
        if head[4:8] in _BOXES:
            promised = _end_of_boxes(file, size)
            if promised is None:
                return 1.0
        elif head[:4] == _EBML:
            promised = _end_of_segment(file)
        elif head[:4] == b"RIFF":
            promised = 8 + int.from_bytes(head[4:8], "little")
        else:
            return 0.0
    return max(0.0, 1.0 - size / promised) if promised else 0.0


def _end_of_boxes(file: BinaryIO, size: int) -> int | None:
    """Where the last top-level box ends; None if there is no `moov`, and no box is cut."""
    at, has_moov = 0, False
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        has_moov |= kind in (b"moov", b"moof")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length == 0:  # It lasts to the end of the file.
            at = size
        elif length < 8:
            break  # Padding: not a box any more.
        else:
            at += length
    return max(at, size) if has_moov or at > size else None


def _end_of_segment(file: BinaryIO) -> int:
    """Where a Matroska segment says it ends; 0 if it does not say."""
    file.seek(4)
    header = _vint(file)
    if header is None:
        return 0
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return 0
    length = _vint(file)
    return 0 if length is None else file.tell() + length


def _vint(file: BinaryIO) -> int | None:
    """An EBML number; None for the reserved "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    n_more = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> n_more)]) + file.read(n_more), "big")
    return None if value == (1 << (7 * (n_more + 1))) - 1 else value
