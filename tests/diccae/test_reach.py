"""A path that only the driver's node has is refused by name, seen from another mount namespace."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from diccae.cli import main
from diccae.errors import UsageError
from diccae.reach import OtherNode, check_cache, check_reach, compare, look
from diccae.stages.ingest import run_ingest
from pipeline.config import IngestConfig
from pipeline.ingest.run import _Run
from pipeline.store.cached import ShardCache

NODES = [OtherNode("1", "train-0 (10.0.0.7)")]
LOOK = """
import json, subprocess, sys
folder, *paths = sys.argv[1:]
if folder:
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
from diccae.reach import look
print(json.dumps(look(paths)))
"""


def _looks_from(emptied: str) -> object:
    """A node that has a disk of its own at `emptied`, as a pod has; with "" it has ours."""

    def looks(nodes: Sequence[OtherNode], paths: Sequence[str]) -> list[list[str] | None]:
        command = ["unshare", "-m", sys.executable, "-c", LOOK, emptied, *paths]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        return [json.loads(done.stdout)]

    return looks


def _may_mount() -> bool:
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return os.geteuid() == 0 and tried.returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="a mount namespace needs root")
@pytest.mark.parametrize("option", ["--out", "--store", "--init"])
def test_a_path_that_another_node_lacks_is_refused_and_one_it_has_passes(
    option: str, tmp_path: Path
) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    for folder in (shared, own):
        folder.mkdir()
        (folder / "store.json").write_text("{}")
    name = "store.json" if option == "--init" else ""
    compare({option: str(shared / name)}, NODES, _looks_from(str(own)))
    said = rf"{option} {own}.*: node train-0 \(10.0.0.7\) .* does not see .*s3://"
    with pytest.raises(UsageError, match=said):
        compare({option: str(own / name)}, NODES, _looks_from(str(own)))
    assert sorted(path.name for path in own.iterdir()) == ["store.json"], "the probe is gone"


@pytest.mark.parametrize("named", ["--videos", "--clips"])
def test_clips_that_another_node_lacks_are_refused_before_one_is_decoded(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In folders of their classes, or named by a list; the node sees the store and the list."""
    clip = tmp_path / "videos" / "dog" / "barking" / "a.mp4"
    clip.parent.mkdir(parents=True)
    clip.write_text("a clip")
    (tmp_path / "list.csv").write_text(f"uri\ns3://bucket/b.mp4\n{clip}\n")

    def looks_from(nodes: Sequence[OtherNode], paths: Sequence[str]) -> list[list[str] | None]:
        here = zip(paths, look(paths), strict=True)
        seen = ["" if "videos" in path else one for path, one in here]
        return [seen for _ in nodes]

    monkeypatch.setattr("diccae.stages.ingest.start_ray", lambda: None)
    monkeypatch.setattr("diccae.reach.other_machines", lambda: NODES)
    monkeypatch.setattr("diccae.reach._looks_from", looks_from)
    monkeypatch.setattr(
        "pipeline.source.listing._listed", lambda folders: {folder: {} for folder in folders}
    )
    monkeypatch.setattr(
        _Run, "_decoded", lambda run, todo: run.start_ray() or pytest.fail("decoded")
    )
    source = {
        "--videos": (None, str(tmp_path / "videos")),
        "--clips": (str(tmp_path / "list.csv"), None),
    }
    place = tmp_path / "videos" if named == "--videos" else clip
    with pytest.raises(UsageError, match=rf"{named}.* {place}: node train-0 .* does not see"):
        run_ingest(*source[named], str(tmp_path / "store"), None, IngestConfig(workers=1))


def test_a_folder_without_a_file_is_seen_by_nobody(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    with pytest.raises(UsageError, match=rf"--videos {tmp_path}: there is no file"):
        compare({"--videos": str(tmp_path)}, NODES, lambda nodes, paths: [look(paths)])


def test_a_demo_on_a_disk_of_the_drivers_own_is_refused_before_clips_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the cluster of a job; in this process it needs no other node."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("diccae.stages.demo.start_ray", lambda: None)
    monkeypatch.setattr("diccae.reach.other_machines", lambda: NODES)
    monkeypatch.setattr("diccae.reach._looks_from", lambda nodes, paths: [["" for _ in paths]])
    monkeypatch.setattr("diccae.stages.demo.clips_written", pytest.fail)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    said = capsys.readouterr().err
    assert f"--out {tmp_path}/demo: node train-0 (10.0.0.7) of the cluster does not see" in said


def test_a_node_that_is_gone_by_now_refuses_nothing(tmp_path: Path) -> None:
    compare({"--out": str(tmp_path)}, NODES, lambda nodes, paths: [None])


def test_one_machine_is_asked_nothing(ray_session: None, tmp_path: Path) -> None:
    check_reach({"--store": str(tmp_path), "--init": "s3://b/x.pth"}, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_node_that_cannot_keep_shards_is_named_before_a_run_starts(
    ray_session: None, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    unusable = ShardCache(str(tmp_path / "file" / "shards"), 2**30)
    said = rf"scale.shard_cache = {unusable.folder}: node .*Not a directory.*; name a folder"
    with pytest.raises(UsageError, match=said):
        check_cache("s3://bucket/store", unusable)
    check_cache(str(tmp_path / "store"), unusable)
    check_cache("s3://bucket/store", ShardCache(str(tmp_path / "shards"), 2**30))
    assert (tmp_path / "shards").is_dir()


def test_a_node_whose_disk_is_smaller_than_the_cache_is_named(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_cache("s3://bucket/store", ShardCache(str(tmp_path), 2**20))
    assert capsys.readouterr().err == ""
    check_cache("s3://bucket/store", ShardCache(str(tmp_path), 2**60))
    said = rf"warning: scale.shard_cache = {tmp_path}: the disk of node \S+ has room for [\d.]+ GiB"
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(said, line)
