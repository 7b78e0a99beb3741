"""Tar parts that announce more than they are: what a reader keeps of them stays small."""

import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from pipeline.config import IngestConfig
from pipeline.reasons import Reason
from pipeline.source.fetch import fetch_all
from pipeline.source.listing import list_sources

BOMB_BYTES = 96 << 20
MOST_BYTES = 24 << 20
"""What listing may hold of it at once: ten KB of gzip unfold to ten MB."""


def header(name: str, kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def clip(name: str) -> bytes:
    return header(name, tarfile.REGTYPE, 512) + bytes(512)


def write_bomb(path: Path, *blocks: bytes) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(clip("good.mp4"))
        for block in blocks:
            file.write(block)
        file.write(clip("behind.mp4") + bytes(1024))


def pax_records(*pairs: tuple[str, str]) -> bytes:
    """A pax header and its records, each `length keyword=value`."""
    records = "".join(f"{len(k) + len(v) + 5} {k}={v}\n" for k, v in pairs).encode()
    return header("pax", tarfile.XHDTYPE, len(records)) + records + bytes(-len(records) % 512)


SPARSE = pax_records(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"))
SMALL = header("pax", tarfile.XHDTYPE, 0)
BOMBS = {
    "pax": [header("pax", tarfile.XHDTYPE, BOMB_BYTES), b"1" * BOMB_BYTES],
    "global pax": [header("pax", tarfile.XGLTYPE, BOMB_BYTES), b"1" * BOMB_BYTES],
    "long name": [header("name", tarfile.GNUTYPE_LONGNAME, BOMB_BYTES), b"n" * BOMB_BYTES],
    "chain": [SMALL * 5000],
    "sparse": [header("s.mp4", tarfile.GNUTYPE_SPARSE, 512), bytes(512)],
    "sparse pax": [SPARSE, header("s.mp4", tarfile.REGTYPE, BOMB_BYTES), b"1" * BOMB_BYTES],
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_costs_what_is_behind_it_and_little_memory(kind, tmp_path, caplog):
    write_bomb(tmp_path / "part_00.tar.gz", *BOMBS[kind])
    tracemalloc.start()
    try:
        rows = list_sources(None, str(tmp_path)).clips.to_pylist()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [row["clip_id"] for row in rows] == ["part_00__good"]
    assert peak < MOST_BYTES
    (record,) = caplog.records
    assert "part_00.tar.gz: cannot be read behind good.mp4" in record.getMessage()


def test_usual_extended_headers_are_read(tmp_path):
    long_name = f"{'folder/' * 30}{'n' * 120}.mp4"
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / f"part_{kind}.tar", "w", format=kind) as tar:
            for i in range(50):
                member = tarfile.TarInfo(f"{i:03d}/{long_name}")
                member.pax_headers = {"comment": "x" * 60_000}
                tar.addfile(member, io.BytesIO())
    assert len(list_sources(None, str(tmp_path)).clips) == 100


def test_a_clip_of_100_gb_is_turned_down_without_being_read(tmp_path):
    good = {
        "clip_id": "good", "uri": f"{tmp_path}/part_00.tar#good.mp4", "size": 512,
        "fp_kind": "stat", "fp": "", "mtime_ns": 0,
    }  # fmt: skip
    large = {**good, "clip_id": "large", "uri": f"{tmp_path}/part_00.tar#l.mp4", "size": 100 << 30}
    (tmp_path / "part_00.tar").write_bytes(clip("good.mp4") + bytes(1024))
    found = {one.clip["clip_id"]: one for one in fetch_all([large, good], IngestConfig())}
    assert found["large"].rejected.reason == Reason.TOO_LARGE
    assert "ingest.max_clip_bytes = 4,294,967,296" in found["large"].rejected.detail
    assert found["good"].rejected is None
    found["good"].release()
    there = {**large, "uri": "memory://bucket/large.mp4"}
    (one,) = fetch_all([there], IngestConfig())
    assert one.rejected.reason == Reason.TOO_LARGE
