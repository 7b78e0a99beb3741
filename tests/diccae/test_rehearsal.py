"""The rehearsal of the full recipe at a thirtieth of its size: its bounds hold, and are bounds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As many rows as two windows of all lanes: fewer would read less than a pass.
SMALL = ["--clips", "6000", "--width", "64", "--tested", "309"]


def _rehearse(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "benchmarks" / "rehearsal.py")
    return subprocess.run(
        [sys.executable, script, "--keep", str(folder), *SMALL, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_every_process_of_the_recipe_keeps_its_bounds(tmp_path: Path) -> None:
    done = _rehearse(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all bounds hold" in done.stdout
    assert done.stdout.count(" GB | ") >= 2 * 11
    tighter = _rehearse(
        tmp_path, "--roles", "plan", "read", "--most-gb", "0.01", "--most-passes", "0.5"
    )
    assert tighter.returncode == 1
    for said in ("plan: 0.", "GB, at most 0.01", "read: 1.", "passes, at most 0.5"):
        assert said in tighter.stdout
