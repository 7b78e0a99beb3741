"""Temporary files of a process that was killed go with the next one; those of a living one stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.scratch import scratch_file

CLIP = """
import os, sys
from pipeline.scratch import scratch_file
handle, path = scratch_file(".mp4")
os.write(handle, b"half a clip")
print(path, flush=True)
sys.stdin.read()
"""
WEIGHTS = """
import sys
from pipeline.storage import Location
place = Location("memory://run")
place.write_bytes("encoder.pth", b"weights")
with place.fetched("encoder.pth") as path:
    print(path, flush=True)
    sys.stdin.read()
"""
WRITTEN = """
import sys
from pipeline.storage import Location
with Location("memory://run").written("encoder.pth") as path:
    path.write_bytes(b"half of the weights")
    print(path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder of temporary files, of this test alone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def holder(place: Path, hold: str) -> tuple[subprocess.Popen, Path]:
    """A process with a temporary file, until its input ends."""
    env = {**os.environ, "TMPDIR": str(place), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", hold],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    return process, Path(process.stdout.readline().strip())


def files(place: Path) -> set[Path]:
    return {path for path in place.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("hold", [CLIP, WEIGHTS, WRITTEN], ids=["clip", "fetched", "written"])
def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(place, hold):
    (killed, left), (living, held) = holder(place, hold), holder(place, hold)
    killed.kill()
    killed.communicate()
    assert files(place) == {left, held}
    handle, own = scratch_file()
    os.close(handle)
    assert files(place) == {held, Path(own)}
    living.communicate()
    assert files(place) == {Path(own)}, "a process that ends by itself takes its own along"


def test_a_folder_that_somebody_removed_is_made_again(place):
    handle, path = scratch_file()
    os.close(handle)
    Path(path).unlink()
    Path(path).with_name("lock").unlink()
    Path(path).parent.rmdir()
    handle, again = scratch_file()
    os.close(handle)
    assert Path(again).exists()
