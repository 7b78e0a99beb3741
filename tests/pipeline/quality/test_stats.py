"""`diccae store stats`: exact numbers, made once, of exactly the rows they name."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from support.stores import noise_store

from diccae.cli import main
from pipeline.config import FeatureSpec
from pipeline.decode.payload import decode_jpegs, fbank_array
from pipeline.quality import stats as stats_module
from pipeline.store.shards import read_rows
from pipeline.store.store import FeatureStore

SPEC = FeatureSpec(n_frames=2, frame_size=32, fbank_frames=24, n_mels=16, duration_s=0.3)


def _stats(store: str, capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    capsys.readouterr()
    assert main(["store", "stats", "--store", store, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return noise_store(tmp_path / "store", SPEC, 150).uri


def test_statistics_are_those_of_all_values_at_once(store: str, capsys) -> None:
    told = _stats(store, capsys)
    rows = FeatureStore.open(store).snapshot().rows("train")
    fbanks, images = [], []
    for shard in pc.unique(rows["shard"]).to_pylist():
        for row in read_rows(store, shard, None, ["fbank", "frames"]).to_pylist():
            fbanks.append(fbank_array(row["fbank"], SPEC).astype(np.float64))
            images.append(decode_jpegs(row["frames"]) / 255.0)
    assert told["clips"] == len(fbanks) == 150
    assert told["fbank_mean"] == pytest.approx(np.mean(fbanks), abs=1e-12)
    assert told["fbank_std"] == pytest.approx(np.std(fbanks), rel=1e-12)
    pixels = np.concatenate(images).reshape(-1, 3)
    assert told["pixel_mean"] == pytest.approx(pixels.mean(0).tolist(), rel=1e-12)
    assert told["pixel_std"] == pytest.approx(pixels.std(0).tolist(), rel=1e-9)
    assert told["spec_hash"] == SPEC.spec_hash()
    assert told["version"] == FeatureStore.open(store).version()


def test_known_statistics_are_read_until_the_rows_are_others(
    store: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _stats(store, capsys)
    with monkeypatch.context() as patched:
        patched.setattr(stats_module, "_summed", None)  # Reading a shard again would fail.
        assert _stats(store, capsys) == first
        target = FeatureStore.open(store)
        states = target.snapshot().clips.slice(0, 3)
        label = states.column_names.index("label")
        renamed = pa.array(["another"] * len(states))
        target.append(states.set_column(label, states.schema.field(label), renamed), {})
        assert _stats(store, capsys) == first
    status = states.column_names.index("status")
    gone = pa.array(["removed"] * len(states))
    target.append(states.set_column(status, states.schema.field(status), gone), {})
    after = _stats(store, capsys)
    assert after["clips"] == first["clips"] - 3
    assert after["fbank_mean"] != first["fbank_mean"]
    assert after["version"] > first["version"]


def test_a_split_without_clips_is_one_line(store: str, capsys) -> None:
    for action in ("stats", "quality"):
        assert main(["store", action, "--store", store, "--split", "validation"]) == 1
        told = capsys.readouterr().err
        assert "no clip in split 'validation' at version" in told
        assert told.endswith("there are train\n")
