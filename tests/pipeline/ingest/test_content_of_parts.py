"""Content fingerprints of clips in tar parts: a part that was copied again costs no decode."""

import gzip
import io
import logging
import os
import re
import shutil
import tarfile
from pathlib import Path

import fsspec
import pytest

from pipeline.ingest import content, shard_decoder
from pipeline.ingest.run import ingest, plan_ingest
from pipeline.ingest.verify import verify
from pipeline.quality.run import check_quality
from pipeline.source import pace, tar_parts

N_CLIPS = 6


def packed(files: dict[str, Path], level: int = 6) -> bytes:
    """A tar.gz of files by the names they have in it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, file in files.items():
            tar.add(file, name)
    return gzip.compress(buffer.getvalue(), level)


class Parts:
    """Two parts with clips, and a store of them by content."""

    def __init__(self, source, folder: Path) -> None:
        self.files = [{f.name: f for f in source.files()[begin::2][:3]} for begin in (0, 1)]
        self.folder = folder / "parts"
        self.folder.mkdir()
        self.paths = [self.folder / f"vgg_0{number}.tar.gz" for number in (0, 1)]
        for path, files in zip(self.paths, self.files, strict=True):
            path.write_bytes(packed(files))
        self.store = str(folder / "store_of_parts")
        self.source = source

    def counts(self, spec=None, **options) -> dict:
        config = self.source.config.model_copy(update={"fingerprint": "sha256", **options})
        summary = ingest(
            None, str(self.folder), self.store, spec, config,
            start_ray=lambda: None, on_progress=lambda progress: None,
        )  # fmt: skip
        return self.source.counts(summary)


@pytest.fixture
def parts(done, tmp_path) -> Parts:
    made = Parts(done, tmp_path)
    assert made.counts(done.spec) == {"new": N_CLIPS, "ok": N_CLIPS}
    return made


def test_a_part_that_was_copied_again_costs_a_hash(parts, monkeypatch):
    first, second = parts.paths
    os.utime(first, ns=(1, 1))
    second.write_bytes(packed(parts.files[1], level=1))
    assert parts.counts() == {"unchanged": N_CLIPS}
    # The new times are written down: nothing is read again.
    monkeypatch.setattr("pipeline.ingest.content.hash_members", None)
    assert parts.counts() == {"unchanged": N_CLIPS}
    assert parts.counts(fingerprint="stat") == {"unchanged": N_CLIPS}


def test_of_a_part_that_changed_only_other_content_is_decoded(parts):
    names = list(parts.files[0])
    other = {**parts.files[0], names[1]: parts.files[1][next(iter(parts.files[1]))]}
    parts.paths[0].write_bytes(packed(other))
    assert parts.counts() == {"changed": 1, "unchanged": N_CLIPS - 1, "ok": 1}


def swapped(parts: Parts) -> None:
    """The first part is packed anew: under its names the content of the second one."""
    content = dict(zip(parts.files[0], parts.files[1].values(), strict=True))
    parts.paths[0].write_bytes(packed(content))


@pytest.mark.parametrize("fingerprint", ["stat", "sha256"])
def test_a_part_that_was_replaced_is_none_to_compare_features_with(parts, fingerprint, done):
    """Between the replacement and the next ingest, under the same names of members."""
    parts.store += f"-{fingerprint}"
    assert parts.counts(done.spec, fingerprint=fingerprint) == {"new": N_CLIPS, "ok": N_CLIPS}
    n_frames = done.spec.n_frames
    assert verify(parts.store, sample=N_CLIPS)["compared"] == N_CLIPS * n_frames
    swapped(parts)
    report = verify(parts.store, sample=N_CLIPS, repair=True)
    assert (report["problems"], report["repaired"]) == ([], 0)
    assert report["compared"] == 3 * n_frames
    assert check_quality(parts.store).sources == {"read": 3, "changed": 3}


@pytest.mark.parametrize("fingerprint", ["stat", "sha256"])
def test_a_part_that_is_replaced_before_it_is_read_is_decoded_once(
    parts, fingerprint, done, monkeypatch
):
    parts.store += f"-{fingerprint}"
    fetch, left = shard_decoder.fetch_all, [parts]

    def replaced_first(clips, config):
        if left:
            swapped(left.pop())
        return fetch(clips, config)

    monkeypatch.setattr(shard_decoder, "fetch_all", replaced_first)
    assert parts.counts(done.spec, fingerprint=fingerprint) == {"new": N_CLIPS, "ok": N_CLIPS}
    assert parts.counts(fingerprint=fingerprint) == {"unchanged": N_CLIPS}


def test_clips_behind_damage_of_a_part_that_was_copied_again_are_set_aside(parts):
    data = parts.paths[0].read_bytes()
    last = parts.files[0][list(parts.files[0])[-1]]
    parts.paths[0].write_bytes(data[: -last.stat().st_size // 2])
    counts = parts.counts()
    assert counts["set_aside"] >= 1
    assert counts == {"unchanged": N_CLIPS - counts["set_aside"], "set_aside": counts["set_aside"]}


@pytest.mark.parametrize("is_packed", [True, False])
def test_windows_of_one_video_have_one_hash(is_packed, done, moving_clip, tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    folder.mkdir()
    path = folder / ("p.tar.gz" if is_packed else "untrimmed00.mp4")
    path.write_bytes(
        packed({"untrimmed00.mp4": moving_clip}) if is_packed else moving_clip.read_bytes()
    )
    csv = tmp_path / "clips.csv"
    csv.write_text("".join(f"untrimmed00,{start},dog,train\n" for start in range(3)))
    config = done.config.model_copy(update={"fingerprint": "sha256"})

    def counts() -> dict:
        return done.counts(
            ingest(
                str(csv), str(folder), str(tmp_path / "store"), done.spec, config,
                start_ray=lambda: None, on_progress=lambda progress: None,
            )
        )  # fmt: skip

    assert counts() == {"new": 3, "ok": 3}
    os.utime(path, ns=(1, 1))
    reads = []
    sha256_of = content.sha256_of
    monkeypatch.setattr(content, "sha256_of", lambda uri: reads.append(uri) or sha256_of(uri))
    assert counts() == {"unchanged": 3}
    assert reads == ([] if is_packed else [str(path)])


def test_a_long_look_says_how_far_it_is(parts, monkeypatch, caplog):
    monkeypatch.setattr(pace, "_FIRST_S", 0.0)
    caplog.set_level(logging.INFO)
    plan_ingest(None, str(parts.folder), f"{parts.store}_new", None, parts.source.config)
    assert any(
        re.fullmatch(
            r"listing the clips in tar parts: 0\.\d of 0\.\d GB, \d+ MB/s, left 0:00:\d\d", message
        )
        for message in caplog.messages
    )
    caplog.clear()
    plan_ingest(None, str(parts.folder), parts.store, None, parts.source.config)
    assert caplog.messages == [], "the index of a part that is known is not read again"
    os.utime(parts.paths[0], ns=(1, 1))
    config = parts.source.config.model_copy(update={"fingerprint": "sha256"})
    plan_ingest(None, str(parts.folder), parts.store, None, config)
    assert any("comparing the content of touched files: " in line for line in caplog.messages)


@pytest.mark.parametrize("kind", ["part", "clip"])
def test_where_content_counts_for_nothing_it_is_said(kind, parts, caplog):
    there = f"memory://content_of_{kind}"
    memory = fsspec.filesystem("memory")
    if kind == "part":
        memory.pipe_file(f"{there}/vgg_00.tar.gz", parts.paths[0].read_bytes())
    else:
        memory.pipe_file(f"{there}/a.mp4", next(iter(parts.files[0].values())).read_bytes())
    config = parts.source.config.model_copy(update={"fingerprint": "sha256"})
    store = f"{parts.store}_elsewhere"
    plan_ingest(None, there, store, parts.source.spec, config)
    (message,) = caplog.messages
    assert "ingest.fingerprint sha256 counts for files and tar parts of this machine" in message
    assert there in message.replace(":///", "://")
    caplog.clear()
    plan_ingest(None, there, store, parts.source.spec, parts.source.config)
    plan_ingest(None, str(parts.folder), parts.store, None, config)
    assert caplog.messages == []


def test_a_part_that_goes_while_its_content_is_read_is_left_to_the_decoder(parts, monkeypatch):
    os.utime(parts.paths[0], ns=(1, 1))
    digest = tar_parts.hash_members

    def gone(uri, wanted):
        shutil.move(uri, f"{uri}.gone")
        try:
            return list(digest(uri, wanted))
        finally:
            shutil.move(f"{uri}.gone", uri)

    monkeypatch.setattr("pipeline.ingest.content.hash_members", gone)
    assert parts.counts() == {"changed": 3, "unchanged": 3, "ok": 3}
