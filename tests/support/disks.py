"""File systems so small that they fill up."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system at `folder`, which is made. Args: size: as mount takes it, `64k`.

    Skips the test where nothing may be mounted: it takes root.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield folder
    finally:
        # Lazily: an actor that is being killed may still hold a file.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
