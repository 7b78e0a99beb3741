"""A mounted disk that fails for a moment, or for good: no clip is quarantined for what passes."""

import errno
import io
import socket
import tarfile
from pathlib import Path

import pytest
from support.disks import small_disk
from support.stores import contents

from pipeline.errors import PipelineError
from pipeline.ingest.run import ingest
from pipeline.store.maintenance import status

BLINKING = "tests.pipeline.blinking_disk:extract"
NO_DISK = Path("/proc/self/mem")
"""A file that opens and gives no byte: Input/output error, by the system itself."""


@pytest.fixture
def blinks(source, tmp_path, monkeypatch):
    """Have clips, the first ones, opened in vain: each with its errors in turn."""
    folder = tmp_path / "blinks"
    folder.mkdir()
    monkeypatch.setenv("TEST_BLINKS", str(folder))

    def plant(*errors: tuple[int, ...]) -> None:
        for file, numbers in zip(source.files(), errors, strict=False):
            (folder / file.name).write_text(" ".join(map(str, numbers)))

    return plant


def test_a_mount_that_fails_once_costs_no_clip(source, undisturbed, blinks):
    source.store += "-again"
    blinks((errno.EIO,), (errno.ESTALE,), (errno.ENOTCONN,), (errno.ETIMEDOUT,))
    summary = source.ingest(source.spec, extractor=BLINKING)
    assert (summary.ok, summary.failed) == (48, 0)
    assert contents(source.store) == undisturbed


def test_what_a_process_lacks_is_tried_again_by_the_next_run(source, undisturbed, blinks):
    source.store += "-again"
    blinks((errno.EMFILE,), (errno.ENFILE,), (errno.ENOMEM,))
    summary = source.ingest(source.spec, extractor=BLINKING)
    assert (summary.ok, summary.failed) == (45, 3)
    assert status(source.store)["by_reason"] == {"worker_died": 3}
    again = source.ingest()
    assert (again.retried, again.ok) == (3, 3)
    assert contents(source.store) == undisturbed


def test_what_is_said_of_bytes_that_can_be_read_is_the_clip_s_own(source, blinks):
    """FFmpeg calls a Matroska file that ends within an element an input/output error, too."""
    source.store += "-again"
    blinks((errno.EIO,) * 99)
    assert source.ingest(source.spec, extractor=BLINKING).failed == 1
    assert status(source.store)["by_reason"] == {"open_failed": 1}
    assert source.ingest().unchanged == 48


def lost(file: Path) -> None:
    file.unlink()
    file.symlink_to(NO_DISK)


@pytest.mark.parametrize("fingerprint", ["stat", "sha256"])
def test_one_file_that_a_disk_does_not_give_may_be_back_for_the_next_run(source, fingerprint):
    first = source.files()[0]
    content = first.read_bytes()
    source.store += "-again"
    lost(first)
    summary = source.ingest(source.spec, fingerprint=fingerprint)
    assert (summary.ok, summary.failed) == (47, 1)
    assert status(source.store)["by_reason"] == {"io_error": 1}
    again = source.ingest(fingerprint=fingerprint)
    assert (again.retried, again.failed) == (1, 1)
    first.unlink()
    first.write_bytes(content)
    assert source.ingest(fingerprint=fingerprint).ok == 1


@pytest.mark.parametrize("fingerprint", ["stat", "sha256"])
def test_a_mount_that_gives_nothing_stops_the_run_and_costs_no_features(
    source, fingerprint, monkeypatch
):
    """Clips that changed: a failed row would stand in place of what is there of them."""
    monkeypatch.setattr("pipeline.ingest.shard_decoder._PAUSE_S", 0.0)
    before = contents(source.store)
    for file in source.files()[:4]:
        lost(file)
    with pytest.raises(PipelineError, match=r"can others beside it.* Mend the storage") as caught:
        source.ingest(fingerprint=fingerprint)
    assert "Input/output error" in str(caught.value)
    assert contents(source.store) == before


@pytest.fixture
def small_tmp(tmp_path, monkeypatch):
    """Temporary files have 64 KB."""
    with small_disk(tmp_path / "small", "64k") as folder:
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        yield folder


def test_a_full_folder_of_temporary_files_is_told_with_its_node(
    done, tmp_path, small_tmp, monkeypatch
):
    monkeypatch.setattr("pipeline.ingest.shard_decoder._PAUSE_S", 0.0)
    parts = tmp_path / "parts"
    parts.mkdir()
    content = done.files()[0].read_bytes()
    with tarfile.open(parts / "part_00.tar", "w") as tar:
        for name in ("a.mp4", "b.mp4"):
            member = tarfile.TarInfo(name)
            member.size = 100_000
            tar.addfile(member, io.BytesIO(content.ljust(member.size, b"\0")))
    with pytest.raises(PipelineError, match="No space left on device") as caught:
        ingest(
            None, str(parts), str(tmp_path / "store"), done.spec, done.config,
            start_ray=lambda: None, on_progress=lambda progress: None,
        )  # fmt: skip
    said = str(caught.value)
    assert f"on {socket.gethostname()}: " in said
    assert f" for {small_tmp}/" in said
    assert "with TMPDIR" in said
