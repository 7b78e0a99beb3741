"""Tar parts of several streams, and damaged ones: no clip of a store is taken for gone."""

import bz2
import gzip
import io
import lzma
import shutil
import tarfile
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import MassRemoval
from pipeline.ingest.run import ingest, plan_ingest
from pipeline.source import tar_parts

N_CLIPS = 10
PACKED = {"tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}


def tar_of(files: list[Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for file in files:
            tar.add(file, file.name)
    return buffer.getvalue()


def in_streams(data: bytes, kind: str) -> bytes:
    """As bgzip and pbzip2 do it: each piece compressed by itself, and an empty one at the end."""
    pack = PACKED[kind]
    pieces = [data[begin : begin + 20_000] for begin in range(0, len(data), 20_000)]
    return b"".join(map(pack, [*pieces, b""]))


class Parts:
    """One tar part with clips, and a store of them."""

    def __init__(self, source, folder: Path, kind: str) -> None:
        self.files = source.files()[:N_CLIPS]
        self.folder = folder / "parts"
        self.folder.mkdir()
        self.path = self.folder / f"vgg_00.{kind}"
        lines = source.csv.read_text().splitlines(keepends=True)
        stems = {file.stem.rpartition("_")[0] for file in self.files}
        self.csv = folder / "in_parts.csv"
        self.csv.write_text("".join(line for line in lines if line.split(",")[0] in stems))
        self.store = str(folder / "store_of_parts")
        self.source = source

    def counts(self, listed: bool, **options) -> dict:
        """What an ingest did. Args: options: of IngestConfig."""
        clips = str(self.csv) if listed else None
        config = self.source.config.model_copy(update=options)
        summary = ingest(
            clips, str(self.folder), self.store, self.source.spec, config,
            start_ray=lambda: None, on_progress=lambda progress: None,
        )  # fmt: skip
        return self.source.counts(summary)

    def plan(self) -> dict[str, int]:
        plan = plan_ingest(None, str(self.folder), self.store, self.source.spec, self.source.config)
        return {name: n for name, n in plan.counts.items() if n}


@pytest.fixture
def parts(done, tmp_path) -> Parts:
    return Parts(done, tmp_path, "tar.gz")


@pytest.mark.parametrize("kind", PACKED)
def test_a_part_of_several_streams_is_read_to_its_end(kind, done, tmp_path, caplog):
    parts = Parts(done, tmp_path, kind)
    parts.path.write_bytes(in_streams(tar_of(parts.files), kind))
    assert parts.counts(False) == {"new": N_CLIPS, "ok": N_CLIPS}
    assert "cannot be read" not in caplog.text


def test_a_part_compressed_anew_in_several_streams_costs_no_clip(parts):
    data = tar_of(parts.files)
    parts.path.write_bytes(gzip.compress(data))
    assert parts.counts(True) == {"new": N_CLIPS, "ok": N_CLIPS}
    at = len(data) - 30_000
    parts.path.write_bytes(gzip.compress(data[:at]) + gzip.compress(data[at:]))
    assert parts.counts(True) == {"changed": N_CLIPS, "ok": N_CLIPS}


def test_what_stands_behind_the_last_stream_is_no_damage(parts, caplog):
    """As tapes and padding downloads leave it."""
    for behind in (bytes(3000), b"no gzip" * 500):
        parts.path.write_bytes(gzip.compress(tar_of(parts.files)) + behind)
        assert parts.plan() == {"new": N_CLIPS}
    assert caplog.messages == []


def test_what_a_name_says_of_the_compression_is_not_believed(parts):
    parts.path.write_bytes(tar_of(parts.files))
    assert parts.plan() == {"new": N_CLIPS}
    parts.path.write_bytes(bz2.compress(tar_of(parts.files)))
    assert parts.plan() == {"new": N_CLIPS}


def rewritten(store: str, damage: str, n_members: int) -> None:
    """Leave the index of the part as an earlier reader wrote it."""
    (path,) = Path(store, "parts").iterdir()
    table = pq.read_table(path).slice(0, n_members)
    pq.write_table(table.replace_schema_metadata({"diccae.damage": damage}), path)


def test_damage_that_an_earlier_reader_saw_is_looked_at_again(parts, monkeypatch, caplog):
    parts.path.write_bytes(in_streams(tar_of(parts.files), "tar.gz"))
    assert parts.counts(False) == {"new": N_CLIPS, "ok": N_CLIPS}
    rewritten(parts.store, "cannot be read from x on", 2)
    assert parts.plan() == {"unchanged": N_CLIPS}
    assert caplog.messages == []
    # Once. What an earlier reader read to its end is whole for this one, too.
    monkeypatch.setattr(tar_parts, "_read_index", None)
    assert parts.plan() == {"unchanged": N_CLIPS}
    rewritten(parts.store, "", N_CLIPS)
    assert parts.plan() == {"unchanged": N_CLIPS}


@pytest.mark.parametrize("listed", [False, True], ids=["folder", "list"])
def test_clips_behind_damage_stay_in_the_store_as_they_are(listed, parts, caplog):
    whole = gzip.compress(tar_of(parts.files))
    parts.path.write_bytes(whole)
    assert parts.counts(listed) == {"new": N_CLIPS, "ok": N_CLIPS}
    size = parts.files[-1].stat().st_size
    parts.path.write_bytes(whole[: -size // 2])
    first = parts.counts(listed)
    n_behind = first["set_aside"]
    assert 1 <= n_behind <= 2
    assert first == {k: N_CLIPS - n_behind for k in ("changed", "ok")} | {"set_aside": n_behind}
    assert "its clips in the store that lie behind that stay as they are" in caplog.text
    assert parts.counts(listed) == {"unchanged": N_CLIPS - n_behind, "set_aside": n_behind}
    parts.path.write_bytes(whole)
    mended = parts.counts(listed)
    assert mended == {"changed": N_CLIPS, "ok": N_CLIPS}


def test_a_part_damaged_near_its_start_is_no_mass_removal(parts):
    whole = gzip.compress(tar_of(parts.files))
    parts.path.write_bytes(whole)
    parts.counts(False)
    parts.path.write_bytes(whole[: len(whole) // 2])
    assert parts.plan()["set_aside"] >= N_CLIPS // 3


def test_a_clip_taken_out_of_the_list_goes_though_its_part_is_damaged(parts):
    whole = gzip.compress(tar_of(parts.files))
    parts.path.write_bytes(whole)
    parts.counts(True)
    first = parts.files[0].stem.rpartition("_")[0]
    lines = parts.csv.read_text().splitlines(keepends=True)
    parts.csv.write_text("".join(line for line in lines if not line.startswith(first)))
    parts.path.write_bytes(whole[: -parts.files[-1].stat().st_size // 2])
    counts = parts.counts(True)
    assert counts["removed"] == 1
    assert counts["set_aside"] + counts["changed"] == N_CLIPS - 1


def test_clips_that_a_whole_part_has_no_more_are_removed(parts):
    parts.path.write_bytes(gzip.compress(tar_of(parts.files)))
    parts.counts(False)
    parts.path.write_bytes(gzip.compress(tar_of(parts.files[1:])))
    assert parts.counts(False)["removed"] == 1
    parts.path.write_bytes(gzip.compress(tar_of(parts.files[:2])))
    with pytest.raises(MassRemoval):
        parts.counts(False)


def test_clips_behind_damage_keep_another_spec_out_of_force(parts):
    whole = gzip.compress(tar_of(parts.files))
    parts.path.write_bytes(whole)
    parts.counts(False)
    parts.path.write_bytes(whole[: -parts.files[-1].stat().st_size // 2])
    other = parts.source.spec.model_copy(update={"n_frames": 3})
    plan = plan_ingest(None, str(parts.folder), parts.store, other, parts.source.config)
    assert not plan.puts_in_force
    assert plan.out_of_reach.places == [str(parts.path)]


@pytest.mark.parametrize("kind", PACKED)
def test_storage_that_fails_inside_a_part_is_no_damage(kind, done, tmp_path, monkeypatch):
    """bz2 and a disk both say OSError."""
    parts = Parts(done, tmp_path, kind)
    parts.path.write_bytes(in_streams(tar_of(parts.files), kind))
    opened = LocalFileSystem.open

    def failing(self, path, mode="rb", **options):
        file = opened(self, path, mode, **options)
        if not path.endswith(kind):
            return file
        read, left = file.read, [4]

        class Failing:
            def __enter__(self):
                return self

            def __exit__(self, *args):
                file.close()

            def seek(self, *args):
                return file.seek(*args)

            def tell(self):
                return file.tell()

            def read(self, size=-1):
                left[0] -= 1
                if not left[0]:
                    raise OSError(5, "Input/output error")
                return read(size)

        return Failing()

    monkeypatch.setattr(LocalFileSystem, "open", failing)
    with pytest.raises(OSError, match="Input/output error"):
        parts.plan()


def test_damaged_bz2_is_damage(done, tmp_path, caplog):
    parts = Parts(done, tmp_path, "tar.bz2")
    data = bytearray(in_streams(tar_of(parts.files), "tar.bz2"))
    data[-40_000:-30_000] = bytes(10_000)
    parts.path.write_bytes(data)
    assert 1 <= parts.plan()["new"] < N_CLIPS
    assert "cannot be read from" in caplog.text


def test_a_part_in_a_bucket_is_read_to_its_end(parts):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/of_streams/vgg_00.tar.gz", in_streams(tar_of(parts.files), "tar.gz"))
    shutil.rmtree(parts.folder)
    parts.folder = "memory://of_streams"
    assert parts.plan() == {"new": N_CLIPS}
