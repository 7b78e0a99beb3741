"""A folder or bucket without a list: every clip in it, whatever else lies there."""

import logging
import os
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.errors import SourceError
from pipeline.ingest.plan import STATE_COLUMNS
from pipeline.ingest.run import plan_ingest
from pipeline.source.entry import clip_id_of
from pipeline.source.listing import list_sources
from pipeline.storage import Location
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.store import FeatureStore


@pytest.fixture
def videos(tmp_path) -> Path:
    folder = tmp_path / "videos"
    for name in ("dog/0001.mp4", "cat/0001.mp4", "cat/deep/-abc_def_12_000030.webm", "top.mkv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "cat" / "notes.txt").write_text("no clip")
    (folder / "cat" / "._0001.mp4").write_bytes(b"what a Mac leaves")
    (folder / ".snapshot" / "dog").mkdir(parents=True)
    (folder / ".snapshot" / "dog" / "0001.mp4").write_bytes(b"what NFS keeps")
    return folder


def listed(videos: object, **options) -> dict[str, dict]:
    rows = list_sources(None, str(videos), **options).clips.to_pylist()
    return {row["clip_id"]: row for row in rows}


def test_clips_of_one_name_in_two_folders_are_two_and_have_no_label(videos):
    rows = listed(videos)
    assert set(rows) == {"dog__0001", "cat__0001", "cat__deep__-abc_def_12_000030", "top"}
    assert {row["label"] for row in rows.values()} == {None}
    assert {row["split"] for row in rows.values()} == {"train"}
    assert rows["dog__0001"]["uri"] == str(videos / "dog/0001.mp4")
    assert rows["dog__0001"]["group"] == "dog/0001.mp4"
    assert rows["cat__deep__-abc_def_12_000030"]["group"] == "-abc_def_12"


def test_ids_and_groups_stay_when_the_folder_moves(videos, tmp_path):
    before = {name: row["group"] for name, row in listed(videos).items()}
    videos.rename(tmp_path / "elsewhere")
    after = {name: row["group"] for name, row in listed(tmp_path / "elsewhere").items()}
    assert after == before


def test_label_from_folder_is_the_folder_a_clip_lies_in(videos, caplog):
    rows = listed(videos, label_from_folder=True)
    labels = {name: row["label"] for name, row in rows.items()}
    assert labels == {
        "dog__0001": "dog", "cat__0001": "cat", "cat__deep__-abc_def_12_000030": "deep",
        "top": None,
    }  # fmt: skip
    assert [r.getMessage() for r in caplog.records] == [
        f"{videos}: 1 clips lie in no folder below it and get no label"
    ]


def test_any_fsspec_uri_is_listed_like_a_local_folder(videos):
    memory = fsspec.filesystem("memory")
    memory.put(f"{videos}/", "memory://bucket/videos/", recursive=True)
    there = listed("memory://bucket/videos", label_from_folder=True)
    here = listed(videos, label_from_folder=True)
    columns = ("label", "split", "group", "size")
    assert {n: [r[c] for c in columns] for n, r in there.items()} == {
        n: [r[c] for c in columns] for n, r in here.items()
    }


def test_tar_parts_are_folders(videos, tmp_path):
    with tarfile.open(videos / "part_00.tar", "w") as tar:
        tar.add(videos / "top.mkv", "bird/0001.mp4")
        tar.add(videos / "top.mkv", "./0002.mp4")
    rows = listed(videos, label_from_folder=True)
    assert rows["part_00__bird__0001"]["label"] == "bird"
    assert rows["part_00__0002"]["label"] == "part_00"
    alone = listed(videos / "part_00.tar")
    assert set(alone) == {"part_00__bird__0001", "part_00__0002"}


def test_two_colons_in_the_name_of_a_part_or_its_folder_are_part_of_it(videos, monkeypatch):
    with tarfile.open(videos / "Foo::bar.tar", "w") as tar:
        tar.add(videos / "top.mkv", "0002.mp4")
    there = videos.rename(videos.with_name("My::videos"))
    assert "Foo::bar__0002" in listed(there)
    assert set(listed(there / "Foo::bar.tar")) == {"Foo::bar__0002"}
    monkeypatch.chdir(there)
    ((_, row),) = listed("Foo::bar.tar").items()
    assert row["uri"] == f"{there}/Foo::bar.tar#0002.mp4"


@pytest.mark.parametrize("other", ["dog__0001.mp4", "dog/0001.webm"])
def test_two_files_of_one_id_are_told_by_name_and_left_out_alone(other, videos, caplog):
    known = list_sources(None, str(videos)).clips.select(["clip_id", "uri"])
    (videos / other).write_bytes(b"x")
    there = list_sources(None, str(videos))
    assert set(there.clips["clip_id"].to_pylist()) == set(known["clip_id"].to_pylist()) - {
        "dog__0001"
    }
    (message,) = caplog.messages
    assert "dog/0001.mp4" in message
    assert other in message
    assert "all clip dog__0001 and left out: rename" in message
    _, compared = there.without_unreadable(known)
    assert "dog__0001" not in compared["clip_id"].to_pylist(), "the store's would count as removed"
    assert len(compared) == len(known) - 1


def test_nothing_to_list_is_said_in_one_line(tmp_path):
    (tmp_path / "a.txt").touch()
    for clips, videos, said in (
        (None, None, "give --videos FOLDER"),
        (
            None,
            str(tmp_path),
            "no videos there.*Videos end in .3g2 .*, or lie in tar parts",
        ),
        (None, str(tmp_path / "a.txt"), "a.txt: a file, expected a folder of videos or a tar part"),
        (None, str(tmp_path / "no"), "no such folder"),
    ):
        with pytest.raises(SourceError, match=said):
            list_sources(clips, videos)


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_files_that_are_no_videos_are_counted(place, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    names = ["a.mp4", "b.rm", "c.RM", "d", "deep/part.tar.zst", "list.csv", ".hidden.rm", "take.qt"]
    folder = str(tmp_path) if place == "disk" else "memory://others"
    for name in names:
        Location(folder).write_bytes(name, b"x")
    clips = list_sources(None, folder).clips
    assert sorted(clips["clip_id"].to_pylist()) == ["a", "take"]
    (message,) = caplog.messages
    assert message.endswith(
        "4 files are left alone, their endings are none of a video: .rm 2, none 1, .zst 1"
    )


def test_a_name_like_a_member_of_a_tar_part_costs_that_file_alone(tmp_path, caplog):
    for name in ("a.mp4", "take.tar#2.mp4", "old.tar#/b.mp4"):
        Location(str(tmp_path)).write_bytes(name, b"x")
    assert list_sources(None, str(tmp_path)).clips["clip_id"].to_pylist() == ["a"]
    assert len(caplog.messages) == 2
    assert all("reads as that of a member of a tar part; rename it" in m for m in caplog.messages)


def test_a_trap_costs_one_warning_and_the_rest_is_found(videos, caplog):
    (videos / "cat" / "gone.mp4").symlink_to("nowhere.mp4")
    (videos / "cat" / "loop.mp4").symlink_to("loop.mp4")
    (videos / "cat" / "up").symlink_to(videos)
    with open(os.fsencode(videos / "cat") + b"/\xff\xfe.mp4", "wb"):
        pass
    (videos / "cat" / "two\nlines.mp4").touch()
    os.mkfifo(videos / "cat" / "pipe.mp4")
    assert set(listed(videos)) == {"dog__0001", "cat__0001", "cat__deep__-abc_def_12_000030", "top"}
    told = sorted(record.getMessage().removeprefix(f"{videos}/cat/") for record in caplog.records)
    assert len(told) == 6
    assert told.pop(0).endswith("two\\nlines.mp4': skipped: its name holds a control character")
    assert told.pop(2) == "pipe.mp4: skipped: a pipe, socket or device"
    assert told[0].startswith("gone.mp4: skipped: a link to a file that is not there")
    assert told[1].startswith("loop.mp4: skipped: Too many levels of symbolic links")
    assert told[2].startswith("up: skipped: a link to a folder above it")
    assert told[3].endswith("skipped: its name is not UTF-8")


MEMBERS = ("caf\udce9.mp4", "two\nlines.mp4", "._0002.mp4", ".hidden/0002.mp4", "./0002.mp4")


def test_names_in_a_part_are_taken_as_names_on_a_disk_are(videos, tmp_path, caplog):
    with tarfile.open(videos / "part_00.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in (*MEMBERS, "caf\udce9.txt"):
            tar.add(videos / "top.mkv", name)
    cache = Location(str(tmp_path / "store"))
    told = [
        f"{videos}/part_00.tar#caf\ufffd.mp4: skipped: its name is not UTF-8",
        f"'{videos}/part_00.tar#two\\nlines.mp4': skipped: its name holds a control character",
    ]
    # The second time from the index that is kept.
    for _ in range(2):
        caplog.clear()
        rows = listed(videos, cache=cache)
        assert [name for name in rows if name.startswith("part_00")] == ["part_00__0002"]
        assert caplog.messages == told


@pytest.mark.parametrize("name", MEMBERS[:2])
def test_damage_behind_a_member_of_any_name_is_one_line(name, videos, tmp_path, caplog):
    with tarfile.open(videos / "part_00.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(videos / "top.mkv", name)
    with open(videos / "part_00.tar", "r+b") as part:
        part.truncate(512 + 3)
    listed(videos, cache=Location(str(tmp_path / "store")))
    (message,) = caplog.messages
    assert "cannot be read from " in message
    assert "\n" not in message


def test_warnings_are_counted_beyond_the_first_ones(videos, caplog):
    for i in range(25):
        (videos / f"gone{i:02d}.mp4").symlink_to("nowhere.mp4")
    listed(videos)
    assert len(caplog.records) == 21
    assert caplog.records[-1].getMessage().endswith("... and 5 more")


@pytest.fixture
def locked(videos, monkeypatch) -> Path:
    """`videos`, of which dog/ may not be read; tests run as root, whom no mode keeps out."""
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    return videos


def test_an_unreadable_folder_costs_one_warning(locked, caplog):
    assert set(listed(locked)) == {"cat__0001", "cat__deep__-abc_def_12_000030", "top"}
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{locked}/dog: skipped: Permission denied; its clips in the store stay as they are"
    )


@pytest.mark.parametrize("csv", [None, "-abc_def_12,30,dog,train\n", "uri\ntop.mkv\n"])
def test_clips_that_may_lie_where_nothing_can_be_read_are_not_taken_for_gone(csv, locked, tmp_path):
    clips = None
    if csv is not None:
        clips = str(tmp_path / "clips.csv")
        Path(clips).write_text(csv)
    schema = [CLIPS_SCHEMA.field(name) for name in STATE_COLUMNS]
    rows = [
        {"clip_id": "dog__0001", "uri": f"{locked}/dog/0001.mp4"},
        {"clip_id": "doge", "uri": f"{locked}/doge.mp4"},
    ]
    states = pa.Table.from_pylist(rows, pa.schema(schema))
    _, known = list_sources(clips, str(locked)).without_unreadable(states)
    kept = {"dog__0001", "doge"} if csv == "uri\ntop.mkv\n" else {"doge"}
    assert set(known["clip_id"].to_pylist()) == kept


def test_many_files_that_cannot_be_looked_at_cost_few_warnings_and_no_clip(tmp_path, caplog):
    n_clips = 1_000
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "whole.mp4").write_bytes(b"")
    (folder / "loop").symlink_to(folder / "loop")
    names = [f"loop/{number:06d}.mp4" for number in range(n_clips)]
    clips = str(tmp_path / "clips.csv")
    Path(clips).write_text("\n".join(["uri", "whole.mp4", *names]))
    store = FeatureStore.create(str(tmp_path / "store"), FeatureSpec())
    rows = [
        {"clip_id": clip_id_of(name), "uri": f"{folder}/{name}", "status": "failed"}
        for name in names
    ]
    store.append(pa.Table.from_pylist(rows, CLIPS_SCHEMA), {})
    plan = plan_ingest(clips, str(folder), store.uri, None, IngestConfig())
    assert (plan.counts["new"], plan.counts["set_aside"]) == (1, n_clips)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 21
    assert messages[-1].endswith(f": ... and {n_clips - 20} more")


def test_an_index_of_parts_is_kept_where_the_store_will_be(videos, tmp_path):
    with tarfile.open(videos / "part_00.tar", "w") as tar:
        tar.add(videos / "top.mkv", "0002.mp4")
    listed(videos, cache=Location(str(tmp_path / "store")))
    assert len(list((tmp_path / "store" / "parts").iterdir())) == 1


def test_a_part_that_may_not_be_read_costs_one_warning(videos, monkeypatch, caplog):
    for name in ("part_00.tar", "part_01.tar"):
        with tarfile.open(videos / name, "w") as tar:
            tar.add(videos / "top.mkv", "0002.mp4")
    opened = LocalFileSystem.open

    def guarded(self, path, mode):
        if path.endswith("part_00.tar"):
            raise PermissionError(13, "Permission denied", path)
        return opened(self, path, mode)

    monkeypatch.setattr(LocalFileSystem, "open", guarded)
    listing = list_sources(None, str(videos))
    assert "part_01__0002" in listing.clips["clip_id"].to_pylist()
    assert listing.unreadable == [f"{videos}/part_00.tar"]
    assert len(caplog.records) == 1
    rows = [{"clip_id": "part_00__0002", "uri": f"{videos}/part_00.tar#0002.mp4"}]
    schema = pa.schema([CLIPS_SCHEMA.field(name) for name in STATE_COLUMNS])
    assert len(listing.without_unreadable(pa.Table.from_pylist(rows, schema))[1]) == 0
