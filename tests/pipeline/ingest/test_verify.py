"""What became of a source is told, and costs no features."""

import json
import os
import shutil
import tarfile

from diccae.cli import main
from pipeline.ingest.verify import verify
from pipeline.source import fetch


def test_repair_keeps_the_features_of_clips_whose_files_are_gone(source):
    shutil.rmtree(source.videos)
    report = verify(source.store, sample=48, repair=True)
    assert (report["problems"], report["repaired"], report["compared"]) == ([], 0, 0)
    assert len(source.snapshot().rows(None)) == 48


def test_a_source_that_does_not_decode_any_more_is_told_and_its_features_stay(source, capsys):
    """Of size and time as ever, so that only the decoder sees it."""
    garbled, cut, *_ = source.files()
    for file, content in ((garbled, b""), (cut, cut.read_bytes()[:100])):
        before = file.stat()
        file.write_bytes(content.ljust(before.st_size, b"\0"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    command = ["store", "verify", "--store", source.store, "--sample", "48"]
    for again in ([], ["--repair"]):
        assert main([*command, *again]) == 1
        told = [line for line in capsys.readouterr().err.splitlines() if "decode any more" in line]
        assert sorted(line.split()[0] for line in told) == [garbled.stem, cut.stem]
        assert len(source.snapshot().rows(None)) == 48


def test_clips_of_a_part_that_is_gone_are_compared_with_nothing(source, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    with tarfile.open(parts / "part_00.tar", "w") as tar:
        for file in source.files()[:2]:
            tar.add(file, file.name)
    source.videos, source.store = parts, f"{source.store}-of-parts"
    source.ingest(source.spec)
    assert verify(source.store, sample=2)["compared"] == 2 * source.spec.n_frames
    (parts / "part_00.tar").unlink()
    report = verify(source.store, sample=2, repair=True)
    assert (report["problems"], report["repaired"], report["compared"]) == ([], 0, 0)


def test_a_part_is_read_once_for_all_clips_drawn_of_it(source, tmp_path, monkeypatch, capsys):
    parts = tmp_path / "parts"
    parts.mkdir()
    for name, begin in (("part_00.tar", 0), ("part_01.tar", 3)):
        with tarfile.open(parts / name, "w") as tar:
            for file in source.files()[begin : begin + 3]:
                tar.add(file, file.name)
    source.videos, source.store = parts, f"{source.store}-of-parts"
    source.ingest(source.spec)
    opened, stream = [], fetch.stream_members

    def counted(part, wanted):
        opened.append(part)
        return stream(part, wanted)

    monkeypatch.setattr(fetch, "stream_members", counted)
    command = ["store", "verify", "--store", source.store, "--sample", "6", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["sampled"], report["compared"]) == (6, 6 * source.spec.n_frames)
    assert sorted(opened) == [f"{parts}/part_00.tar", f"{parts}/part_01.tar"]
