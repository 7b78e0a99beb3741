"""What an installed wheel holds beside the code: recipes, templates, the report's page."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"


def test_a_wheel_holds_what_the_command_reads(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wanted = set()
    for folder in ("pipeline", "clustering", "training", "deploy", "diccae", "configs"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
        suffixes = {".py", ".yaml", ".css", ".js"}
        files = (f for f in (source / folder).rglob("*") if f.suffix in suffixes)
        wanted |= {file.relative_to(source).as_posix() for file in files}
    built = subprocess.run(
        [sys.executable, "-c", _BUILD], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(source / built.stdout.split()[-1]) as wheel:
        missing = wanted - set(wheel.namelist())
    assert "configs/smoke.yaml" in wanted
    assert not missing
