"""Machines without decord (aarch64): the same frames by PyAV, and one kind of bytes in a store."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stores import contents

from pipeline.config import FeatureSpec
from pipeline.decode.payload import decode_jpegs
from pipeline.errors import PipelineError
from pipeline.store.shards import read_rows
from pipeline.store.store import FeatureStore

SPEC = FeatureSpec(n_frames=2, frame_size=64, duration_s=2.0, fbank_frames=200)
OPTIONS = [
    *("--features.n-frames", "2", "--features.frame-size", "64"),
    *("--features.duration-s", "2", "--features.fbank-frames", "200", "--ingest.workers", "1"),
]


@pytest.fixture
def ingest_without_decord(tmp_path: Path):
    """Run `diccae ingest` in a process whose children cannot import decord either."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['decord'] = None")

    def run(source, store: Path) -> "subprocess.CompletedProcess[str]":
        paths = [str(tmp_path), *sys.path]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "diccae", "ingest", "--clips", str(source.csv)]
        command += ["--videos", str(source.videos), "--store", str(store), *OPTIONS]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)

    return run


@pytest.fixture
def jumpy(source, ffmpeg, tmp_path: Path):
    """Two clips of many key frames, which `auto` has decord jump between."""
    lines = source.csv.read_text().splitlines()[:2]
    source.csv.write_text("\n".join(lines) + "\n")
    for line in lines:
        name = line.split(",")[0]
        [clip] = [path for path in source.files() if path.name.startswith(name)]
        shutil.move(clip, tmp_path / "before.mp4")
        ffmpeg("-i", tmp_path / "before.mp4", "-g", "2", "-c:a", "copy", clip)
    return source


def _decoders(store: Path | str) -> set[str]:
    return {row["decoder"] for row in _features(str(store))}


@pytest.mark.slow
def test_a_store_made_without_decord_has_the_frames_and_the_spec_of_pyav(
    jumpy, ingest_without_decord, tmp_path: Path
) -> None:
    done = ingest_without_decord(jumpy, tmp_path / "arm")
    assert done.returncode == 0, done.stderr
    jumpy.store = str(tmp_path / "pyav")
    jumpy.ingest(SPEC.model_copy(update={"decoder": "pyav"}))
    assert contents(str(tmp_path / "arm")) == contents(jumpy.store)
    assert _decoders(tmp_path / "arm") == {"pyav"}

    again = ingest_without_decord(jumpy, tmp_path / "arm")
    assert again.returncode == 0, again.stderr
    assert len(FeatureStore.open(str(tmp_path / "arm")).snapshot().rows(None)) == 2

    # The control: decord, which shows the same frames, rounds some pixels otherwise.
    jumpy.store = str(tmp_path / "auto")
    jumpy.ingest(SPEC)
    assert _decoders(jumpy.store) == {"decord"}
    assert contents(str(tmp_path / "arm")) != contents(jumpy.store)
    ours, theirs = _frames(str(tmp_path / "arm")), _frames(jumpy.store)
    assert ours.keys() == theirs.keys()
    for clip_id in ours:
        assert ours[clip_id][0] == theirs[clip_id][0], "times"
        assert np.abs(ours[clip_id][1] - theirs[clip_id][1]).mean() < 2.0


def _frames(store: str) -> dict[str, tuple[list[int], np.ndarray]]:
    return {
        row["clip_id"]: (row["frame_ts_ms"], decode_jpegs(row["frames"]).astype(float))
        for row in _features(store)
    }


def _features(store: str) -> list[dict[str, Any]]:
    columns = ["clip_id", "frame_ts_ms", "frames", "decoder"]
    shards = set(FeatureStore.open(store).snapshot().rows(None)["shard"].to_pylist())
    return [row for shard in shards for row in read_rows(store, shard, None, columns).to_pylist()]


def test_a_store_that_decord_helped_to_make_is_refused_without_it(
    jumpy, ingest_without_decord, tmp_path: Path
) -> None:
    jumpy.store = str(tmp_path / "auto")
    jumpy.ingest(SPEC)
    before = contents(jumpy.store)
    done = ingest_without_decord(jumpy, tmp_path / "auto")
    assert done.returncode == 1
    assert "decord is not installed here" in done.stderr
    assert "--features.decoder pyav" in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(jumpy.store) == before


def test_a_node_without_the_decord_of_its_driver_decodes_nothing(
    jumpy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jumpy.store = str(tmp_path / "mixed")
    asked: list[int] = []

    def only_on_the_driver() -> bool:
        asked.append(1)
        return len(asked) == 1

    monkeypatch.setattr("pipeline.decode.choice.has_decord", only_on_the_driver)
    with pytest.raises(PipelineError, match="would differ from those of the other nodes"):
        jumpy.ingest(SPEC)
    assert contents(jumpy.store) == []
    jumpy.ingest(SPEC.model_copy(update={"decoder": "pyav"}))
    assert len(contents(jumpy.store)) == 2
