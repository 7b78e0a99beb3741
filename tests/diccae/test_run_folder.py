"""run.json: written wherever the code runs, with the versions that are there."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from diccae import __version__, run_folder
from diccae.run_folder import RunFolder
from training.errors import TrainingError


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


@pytest.mark.parametrize("content", [b'{"trunc', b"\xff", b"[1]"])
def test_a_damaged_record_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(TrainingError, match=r"run\.json: damaged.*put a copy of it back") as raised:
        _ = RunFolder(tmp_path).record
    assert "\n" not in str(raised.value)
