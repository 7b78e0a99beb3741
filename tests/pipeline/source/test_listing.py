"""Lists of clips as they come: nasty CSVs, manifests, tar parts; one clear line per problem."""

import gzip
import io
import os
import random
import tarfile
import threading
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.errors import SourceError
from pipeline.ingest.run import plan_ingest
from pipeline.source.fetch import fetch_all
from pipeline.source.listing import list_sources
from pipeline.storage import Location


@pytest.fixture
def videos(tmp_path) -> Path:
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    for name in ("-abc_def_12_000030.mp4", "deep/_zzzzzzzzzz_000001.webm", "untrimmed00.mkv"):
        (folder / name).write_bytes(b"x" * len(name))
    return folder


def listed(csv: bytes, videos: Path) -> list[dict]:
    path = videos.parent / "clips.csv"
    path.write_bytes(csv)
    return list_sources(str(path), str(videos)).clips.to_pylist()


def refused(csv: bytes, videos: Path) -> list[str]:
    with pytest.raises(SourceError) as caught:
        listed(csv, videos)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_vggsound_csv_with_quotes_bom_and_crlf(mark, end, videos):
    lines = [
        b'-abc_def_12,30,"playing guitar, electric",train',
        b"",
        b"_zzzzzzzzzz,1,dog,test",
        b"",
    ]
    first, second = listed(mark + end.join(lines), videos)
    assert (first["clip_id"], first["label"]) == ("-abc_def_12_000030", "playing guitar, electric")
    assert first["uri"].endswith("/-abc_def_12_000030.mp4")
    assert first["start_s"] is None
    assert (second["clip_id"], second["split"]) == ("_zzzzzzzzzz_000001", "test")
    assert second["size"] == 28


def test_untrimmed_video_is_cut_at_its_start_for_each_clip(videos):
    rows = listed(b"untrimmed00,5,dog,train\nuntrimmed00,77,cat,train", videos)
    assert [(row["clip_id"], row["start_s"]) for row in rows] == [
        ("untrimmed00_000005", 5.0), ("untrimmed00_000077", 77.0),
    ]  # fmt: skip
    assert len({row["uri"] for row in rows}) == 1


def test_clip_without_a_file_is_listed_without_fingerprint(videos):
    rows = listed(b"nothere0000,5,dog,train\n-abc_def_12,30,dog,train", videos)
    assert [row["fp"] is None for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"../../etc/pw,1,dog,train", "line 2: '../../etc/pw' is not a video id"),
        (b"abc/def,1,dog,train", "line 2: 'abc/def' is not a video id"),
        (b"abc,x,dog,train", "line 2: start 'x' is not a whole number"),
        (b"abc,-3,dog,train", "line 2: start '-3'"),
        (b"abc,1,,train", "line 2: the label is empty"),
        (b"abc,1,dog,", "line 2: the split is empty: expected train, test or another name"),
        (b"abc,1,dog, big,train", "line 2: 5 columns, expected 4"),
        (b"abc,1,dog,../../x", "line 2: '../../x' is not a split: it holds a path"),
        (b"-abc_def_12,30,cat,test", "line 2: clip -abc_def_12_000030 is already on line 1"),
    ],
)
def test_bad_line_is_one_clear_line(line, told, videos):
    (message,) = refused(b"-abc_def_12,30,dog,train\n" + line, videos)
    assert told in message


def test_label_that_training_does_not_know_is_one_warning_each(videos, caplog):
    lines = ["-abc_def_12,30,barking dog,train", "_zzzzzzzzzz,1,barking dgo,test",
             "untrimmed00,1,barking dgo,test", "untrimmed00,9,barking dog,test"]  # fmt: skip
    assert len(listed("\n".join(lines).encode(), videos)) == 4
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.endswith(
        "line 2: no training clip has label 'barking dgo'; did you mean 'barking dog'?"
    )


@pytest.mark.parametrize(
    "header",
    ["filename,label", "URI,label", "uri;label", "uri\tlabel", "youtube_id,start,label,split"],
)
def test_another_header_is_told_once_and_whole(header, videos):
    line = ",".join("x" for _ in header.split(","))
    (message,) = refused(f"{header}\n{line}\n{line}\n".encode(), videos)
    assert f"the first line is {header!r}. Expected VGGSound's columns" in message
    assert "a manifest, whose header has uri" in message


@pytest.mark.parametrize(
    ("split", "meant"), [("Train", "train"), ("trian", "train"), ("tests", "test")]
)
def test_a_misspelt_split_is_a_warning(split, meant, videos, caplog):
    lines = [f"-abc_def_12,30,dog,{split}", "untrimmed00,1,dog,train", "untrimmed00,9,dog,holdout"]
    assert len(listed("\n".join(lines).encode(), videos)) == 3
    (message,) = caplog.messages
    assert f"1 clips are of split '{split}', which nothing asks for" in message
    assert message.endswith(f"did you mean '{meant}'?")


def test_a_folder_is_no_list(videos):
    with pytest.raises(SourceError, match="a folder, expected a CSV or Parquet list; clips thems"):
        list_sources(str(videos), str(videos))


def test_all_bad_lines_are_told_at_once_and_capped(videos):
    messages = refused(b"-abc_def_12,30,dog,train\n" + b"a/b,1,dog,train\n" * 50, videos)
    assert len(messages) == 21
    assert messages[-1] == "... and 30 more"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00", b"PAR1"])
def test_what_is_no_list_is_refused(content, videos):
    assert len(refused(content, videos)) == 1


def test_missing_list_folder_and_files_are_told_apart(videos, tmp_path):
    with pytest.raises(SourceError, match="no such file"):
        list_sources(str(tmp_path / "no.csv"), str(videos))
    (tmp_path / "a.csv").write_text("nothere0000,5,dog,train\n")
    with pytest.raises(SourceError, match="no such folder"):
        list_sources(str(tmp_path / "a.csv"), str(tmp_path / "no"))
    with pytest.raises(SourceError, match="mounted"):
        list_sources(str(tmp_path / "a.csv"), str(videos))


def test_files_named_alike_are_told_if_the_list_names_them(videos, tmp_path, caplog):
    (videos / "deep" / "-abc_def_12_000030.mkv").write_bytes(b"x")
    (videos / "deep" / "unlisted.mkv").write_bytes(b"x")
    (videos / "unlisted.mkv").write_bytes(b"x")
    content = "-abc_def_12,30,dog,train\n_zzzzzzzzzz,1,dog,test\n"
    (tmp_path / "list.csv").write_text(content)
    clips = list_sources(str(tmp_path / "list.csv"), str(videos)).clips.to_pylist()
    assert [clip["size"] is not None for clip in clips] == [False, True]
    (message,) = caplog.messages
    assert "deep/-abc_def_12_000030.mkv" in message
    (only,) = refused(b"-abc_def_12,30,dog,train", videos)
    assert "none of the 1 clips" in only


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifest_of_another_data_set(kind, videos, tmp_path):
    rows = {
        "uri": ["deep/_zzzzzzzzzz_000001.webm", str(videos / "untrimmed00.mkv"), "gone.mp4"],
        "start_s": [None, 2.5, None],
        "end_s": [None, 4.0, None],
        "label": ["a, b", "c", "d"],
        "split": ["train", "test", "train"],
    }
    path = tmp_path / f"manifest.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(rows), path)
    else:
        lines = ["uri,start_s,end_s,label,split"]
        for row in pa.table(rows).to_pylist():
            cells = ("" if value is None else f'"{value}"' for value in row.values())
            lines.append(",".join(cells))
        path.write_text("\n".join(lines))
    first, second, third = list_sources(str(path), str(videos)).clips.to_pylist()
    assert (first["clip_id"], first["label"], first["start_s"]) == (
        "deep___zzzzzzzzzz_000001", "a, b", None,
    )  # fmt: skip
    assert (second["clip_id"], second["start_s"], second["end_s"]) == (
        "untrimmed00_000002.500", 2.5, 4.0,
    )  # fmt: skip
    assert third["fp"] is None


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("../x.mp4,,,dog,train,", "outside the folder"),
        ("x.mp4,5,3,dog,train,", "end_s 3 is not after start_s 5"),
        ("x.mp4,abc,,dog,train,", "start_s 'abc' is not a number"),
        ("x.mp4,nan,,dog,train,", "start_s 'nan' is not a time"),
        ("x.mp4,,,dog,train,../../a", "it holds a path"),
        (",,,dog,train,", "the uri is empty"),
        ("x.mp4,,,dog,,", "the split is empty: expected train, test or another name"),
        ("a.tar#2/x.mp4,,,dog,train,", "reads as a member of a tar part: rename the file"),
        (
            "x.mp4,3,9,dog,train,\nx.mp4,3,8,dog,train,",
            "another end: tell them apart in a column",
        ),
        ("x.mp4,,,dog,../../x,", "'../../x' is not a split: it holds a path"),
        ("x.mp4,,,dog,tr\x07ain,", "not a split: it holds a path or a control character"),
        ("x.mp4,,,dog,..,", "'..' is not a split: it holds a path"),
        ("x.mp4,,,dog barking, growling,test,", "line 2: 7 columns, expected 6 .uri, start_s"),
        ("x.mp4,,,dog", "line 2: 4 columns, expected 6 .*; a label with a comma needs quotes"),
    ],
)
def test_bad_manifest_row_is_one_clear_line(row, told, videos, tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(f"uri,start_s,end_s,label,split,clip_id\n{row}\n")
    with pytest.raises(SourceError, match=told):
        list_sources(str(path), str(videos))


def manifest(text: str, videos: Path, base: object = None) -> list[dict]:
    path = videos.parent / "m.csv"
    path.write_text(text)
    return list_sources(str(path), str(base or videos)).clips.to_pylist()


@pytest.mark.parametrize("text", ["uri\nuntrimmed00.mkv\n", "uri,label\nuntrimmed00.mkv,\n"])
def test_manifest_without_labels_and_splits_is_one_of_unlabelled_training_clips(text, videos):
    (row,) = manifest(text, videos)
    assert (row["clip_id"], row["label"], row["split"]) == ("untrimmed00", None, "train")


def test_files_of_one_name_in_two_folders_are_two_clips_of_a_manifest(videos, monkeypatch):
    (videos / "untrimmed00.webm").touch()
    (videos / "deep" / "untrimmed00.mkv").touch()
    text = f"uri\nuntrimmed00.mkv\ndeep/untrimmed00.mkv\n{videos}/deep/_zzzzzzzzzz_000001.webm\n"
    ids = [row["clip_id"] for row in manifest(text, videos)]
    assert ids == ["untrimmed00", "deep__untrimmed00", "deep___zzzzzzzzzz_000001"]
    monkeypatch.chdir(videos.parent)
    assert [row["clip_id"] for row in manifest(text, videos, "videos")] == ids
    elsewhere = videos.parent / "elsewhere"
    elsewhere.mkdir()
    text = f"uri\n{videos}/untrimmed00.mkv\n{videos}/deep/untrimmed00.mkv\n"
    with pytest.raises(SourceError) as caught:
        manifest(text, videos, elsewhere)
    (message,) = str(caught.value).splitlines()
    assert "line 3: clip untrimmed00 is already on line 2" in message
    assert f"({videos}/untrimmed00.mkv there, {videos}/deep/untrimmed00.mkv here)" in message
    assert "a column clip_id" in message
    named = f"uri,clip_id\n{videos}/untrimmed00.mkv,a\n{videos}/deep/untrimmed00.mkv,b\n"
    assert [row["clip_id"] for row in manifest(named, videos, elsewhere)] == ["a", "b"]


def test_a_manifest_gives_a_clip_several_labels(videos, tmp_path):
    text = 'uri,labels\nuntrimmed00.mkv,"Speech| Dog, barking |Speech"\n-abc_def_12_000030.mp4,\n'
    rows = manifest(text, videos)
    assert [(r["label"], r["more_labels"]) for r in rows] == [
        ("Speech", "Dog, barking"),
        (None,) * 2,
    ]
    lists = pa.table({"uri": ["untrimmed00.mkv"], "labels": [["Speech", "Dog, barking"]]})
    pq.write_table(lists, tmp_path / "m.parquet")
    (row,) = list_sources(str(tmp_path / "m.parquet"), str(videos)).clips.to_pylist()
    assert (row["label"], row["more_labels"]) == ("Speech", "Dog, barking")
    pq.write_table(pa.table({"uri": ["a.mkv"], "labels": [["a|b"]]}), tmp_path / "m.parquet")
    with pytest.raises(SourceError, match=r"line 1: label 'a\|b' holds \|"):
        list_sources(str(tmp_path / "m.parquet"), str(videos))
    with pytest.raises(SourceError, match="columns label and labels: keep one"):
        manifest("uri,label,labels\nuntrimmed00.mkv,a,b\n", videos)


NAN = float("nan")


@pytest.mark.parametrize(
    ("columns", "as_csv"),
    [
        ({"label": [0, 1], "group": [0, 7], "split": [0, 1], "clip_id": [0, 1]}, "0,0,0,0 1,7,1,1"),
        # As pandas has whole numbers of which some are missing.
        ({"label": [0.0, NAN], "group": [NAN, 0.0], "clip_id": [0.0, NAN]}, "0,,0 ,0,"),
        ({"labels": [[0, 1], [0]], "start_s": [NAN, 2.0]}, "0|1, 0,2"),
        ({"labels": [0.0, NAN], "end_s": [NAN, 2.5]}, "0, ,2.5"),
    ],
)
def test_numbers_in_a_parquet_manifest_are_what_they_are_in_a_csv(
    columns, as_csv, videos, tmp_path
):
    """Class 0 is a class, and group 0 a group."""
    uris = ["untrimmed00.mkv", "-abc_def_12_000030.mp4"]
    pq.write_table(pa.table({"uri": uris, **columns}), tmp_path / "m.parquet")
    lines = [f"{uri},{row}" for uri, row in zip(uris, as_csv.split(" "), strict=True)]
    (tmp_path / "m.csv").write_text("\n".join([",".join(["uri", *columns]), *lines]))
    todo = {
        kind: plan_ingest(
            str(tmp_path / f"m.{kind}"), str(videos), str(tmp_path / "no"), None, IngestConfig()
        ).todo
        for kind in ("parquet", "csv")
    }
    assert todo["parquet"].to_pylist() == todo["csv"].to_pylist()
    assert todo["csv"]["label"][0].as_py() == "0"


def test_folders_of_a_manifest_in_a_bucket_are_listed_side_by_side(videos, monkeypatch):
    n_folders = 8
    ls = MemoryFileSystem.ls
    together = threading.Barrier(n_folders)

    def waiting(self, path, detail=True, **options):
        # One after another they would wait for each other in vain.
        together.wait(timeout=10)
        return ls(self, path, detail, **options)

    uris = [f"memory://data/{number}/clip.mp4" for number in range(n_folders)]
    for uri in uris[1:]:
        fsspec.filesystem("memory").pipe_file(uri, b"x")
    monkeypatch.setattr(MemoryFileSystem, "ls", waiting)
    text = "".join(f"{uri},clip{number}\n" for number, uri in enumerate(uris))
    rows = manifest(f"uri,clip_id\n{text}", videos)
    assert [row["uri"] for row in rows] == uris
    assert [row["size"] for row in rows] == [None, *[1] * (n_folders - 1)]


def table_of(videos: Path, **columns: pa.Array) -> list[dict]:
    path = videos.parent / "m.parquet"
    pq.write_table(pa.table({"uri": pa.array(["untrimmed00.mkv"]), **columns}), path)
    return list_sources(str(path), str(videos)).clips.to_pylist()


def test_bytes_of_a_parquet_manifest_are_text(videos):
    (row,) = table_of(
        videos, uri=pa.array([b"untrimmed00.mkv"]), label=pa.array([b"chien \xc3\xa9"])
    )
    assert (row["label"], row["size"] is not None) == ("chien é", True)
    (row,) = table_of(videos, label=pa.array(["dog"]).dictionary_encode())
    assert row["label"] == "dog"
    (row,) = table_of(videos, label=pa.array([b"dog"], pa.binary_view()))
    assert row["label"] == "dog"
    with pytest.raises(SourceError, match="cannot be read as UTF-8"):
        table_of(videos, label=pa.array([b"\xff\xfe"]))


def test_text_and_lists_of_any_layout_are_read(videos):
    """Polars writes views."""
    uri, label = (pa.array([text], pa.string_view()) for text in ("untrimmed00.mkv", "dog"))
    (row,) = table_of(videos, uri=uri, label=label)
    assert (row["label"], row["size"] is not None) == ("dog", True)
    for lists in (pa.list_(pa.string(), 2), pa.large_list(pa.string_view())):
        (row,) = table_of(videos, labels=pa.array([["cat", "dog"]], lists))
        assert (row["label"], row["more_labels"]) == ("cat", "dog")


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("label", pa.array([["cat", "dog"]]), "may be text; several classes go to a column labels"),
        ("label", pa.array([True]), "column label is of type bool; it may be text"),
        ("labels", pa.array([{"a": 1}]), "it may be text, or lists of text"),
        ("start_s", pa.array([True]), "column start_s is of type bool; it may be numbers"),
        ("start_s", pa.array([1], pa.duration("s")), "of type duration.s.; it may be numbers"),
        ("end_s", pa.array([1], pa.time32("s")), "of type time32.ms.; it may be numbers"),
    ],
)
def test_a_column_of_another_type_is_refused_by_name(column, value, told, videos):
    with pytest.raises(SourceError, match=told):
        table_of(videos, **{column: value})


def test_group_is_the_column_or_the_video_of_a_vggsound_name_or_the_uri(videos):
    text = (
        "uri,start_s,group\nuntrimmed00.mkv,1,recording 7\nuntrimmed00.mkv,2,\n"
        "-abc_def_12_000030.mp4,,\ndeep/_zzzzzzzzzz_000001.webm,,\n"
    )
    groups = [row["group"] for row in manifest(text, videos)]
    assert groups == ["recording 7", "untrimmed00", "-abc_def_12", "_zzzzzzzzzz"]
    rows = manifest(
        "uri,start_s,end_s\n" + "".join(f"untrimmed00.mkv,{w}\n" for w in (",3", "3,6", "6.5,9")),
        videos,
    )
    assert {row["group"] for row in rows} == {"untrimmed00"}, "whatever its second is"
    assert listed(b"untrimmed00,5,dog,train", videos)[0]["group"] == "untrimmed00"


def test_manifest_with_a_misspelt_column_is_refused(videos, tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("uri,lable,split\nx.mp4,dog,train\n")
    with pytest.raises(SourceError, match="uri, lable, split"):
        list_sources(str(path), str(videos))


CLIP_BYTES = 100_000
"""Far more than what is read of a part at a time: only so is the clip before damage spared."""


def write_part(path: Path, names: list[str]) -> None:
    """A part of clips that gzip can make smaller, so that damage is seen where it is."""
    noise = random.Random(path.name)
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(f"scratch/train_data/video/{name}.mp4")
            member.size = CLIP_BYTES
            tar.addfile(member, io.BytesIO(bytes(noise.choices(range(64), k=CLIP_BYTES))))


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    names = [f"clip{i:07d}_{i:06d}" for i in range(20)]
    write_part(folder / "vgg_00.tar.gz", names[:10])
    write_part(folder / "vgg_01.tar.gz", names[10:])
    csv = tmp_path / "clips.csv"
    csv.write_text("".join(f"clip{i:07d},{i},dog,train\n" for i in range(20)))
    return csv, folder


def test_clips_are_found_in_tar_parts_and_read_as_a_stream(parts):
    csv, folder = parts
    rows = list_sources(str(csv), str(folder)).clips.to_pylist()
    assert [row["fp"] is not None for row in rows] == [True] * 20
    fetched = []
    for one in fetch_all(rows[3:6], IngestConfig()):
        fetched.append((one.clip["clip_id"], Path(one.path).stat().st_size))
        one.release()
        assert not Path(one.path).exists()
    assert fetched == [(f"clip{i:07d}_{i:06d}", CLIP_BYTES) for i in (3, 4, 5)]


def test_whoever_stops_between_two_clips_of_a_member_leaves_no_file(parts, tmp_path, monkeypatch):
    csv, folder = parts
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    row = list_sources(str(csv), str(folder)).clips.to_pylist()[3]
    windows = fetch_all([row | {"start_s": 0.0}, row | {"start_s": 1.0}], IngestConfig())
    one = next(windows)
    one.release()
    assert Path(one.path).exists(), "the other window is read from it"
    windows.close()
    assert not Path(one.path).exists()


def test_damage_in_a_part_costs_only_what_is_behind_it(parts):
    csv, folder = parts
    path = folder / "vgg_00.tar.gz"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    rows = list_sources(str(csv), str(folder)).clips.to_pylist()
    found = [row["fp"] is not None for row in rows]
    assert found[:4] == [True] * 4
    assert found[5:10] == [False] * 5
    assert found[10:] == [True] * 10


def test_damage_after_the_listing_rejects_the_clips_behind_it(parts):
    csv, folder = parts
    rows = list_sources(str(csv), str(folder)).clips.to_pylist()[:10]
    path = folder / "vgg_00.tar.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = b"\0" * 2000
    path.write_bytes(data)
    fetched = list(fetch_all(rows, IngestConfig()))
    assert sorted(one.clip["clip_id"] for one in fetched) == [row["clip_id"] for row in rows]
    rejected = [one.rejected is not None for one in fetched]
    assert rejected[:4] == [False] * 4
    assert rejected[-3:] == [True] * 3
    for one in fetched:
        one.release()


def test_a_part_is_read_through_once(parts, tmp_path, monkeypatch):
    csv, folder = parts
    cache = Location(str(tmp_path / "store"))
    first = list_sources(str(csv), str(folder), cache)
    # A second listing could not read the parts: it must know them.
    monkeypatch.setattr("pipeline.source.tar_parts._read_index", None)
    assert list_sources(str(csv), str(folder), cache) == first
    stat = (folder / "vgg_00.tar.gz").stat()
    os.utime(folder / "vgg_00.tar.gz", ns=(1, stat.st_mtime_ns + 1))
    with pytest.raises(TypeError):
        list_sources(str(csv), str(folder), cache)


def test_gzip_that_is_no_tar_is_damage_from_the_start(parts):
    csv, folder = parts
    (folder / "vgg_00.tar.gz").write_bytes(gzip.compress(b"no tar"))
    rows = list_sources(str(csv), str(folder)).clips.to_pylist()
    assert sum(row["fp"] is not None for row in rows) == 10


def test_windows_longer_than_the_features_are_one_warning(videos, tmp_path, caplog):
    listed = tmp_path / "m.csv"
    rows = ("a,untrimmed00.mkv,0,6", "b,untrimmed00.mkv,10.1,14.5", "c,untrimmed00.mkv,0.1,2.1")
    listed.write_text("\n".join(["clip_id,uri,start_s,end_s", *rows, "d,untrimmed00.mkv,3,"]))
    spec = FeatureSpec(duration_s=2.0)
    where = (str(listed), str(videos), str(tmp_path / "store"))
    assert plan_ingest(*where, spec, IngestConfig()).counts["new"] == 4
    (message,) = caplog.messages
    assert message.startswith("2 windows of the list are longer than features.duration_s = 2 s")
    assert "(up to 6 s)" in message
    caplog.clear()
    plan_ingest(*where, FeatureSpec(duration_s=6.0), IngestConfig())
    assert caplog.messages == []
