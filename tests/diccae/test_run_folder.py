"""run.json: written wherever the code runs, with the versions that are there."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from diccae import __version__, run_folder
from diccae.run_folder import RunFolder


def test_a_run_says_its_versions_also_where_code_was_submitted_and_faiss_is_for_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on aarch64, and on a cluster whose image has the dependencies alone."""

    def installed(name: str) -> str:
        if name in ("diccae", "faiss-gpu"):
            raise metadata.PackageNotFoundError(name)
        return "1.15.1" if name == "faiss-cpu" else metadata.version(name)

    monkeypatch.setattr(run_folder, "version", installed)
    RunFolder(str(tmp_path)).write_record(begun=True)
    versions = json.loads((tmp_path / "run.json").read_text())["versions"]
    assert versions["diccae"] == __version__
    assert versions["faiss-cpu"] == "1.15.1"
    assert versions["torch"] == metadata.version("torch")
    assert "faiss-gpu" not in versions
