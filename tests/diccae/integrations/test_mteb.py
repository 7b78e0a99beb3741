"""A run's encoder through mteb's protocol, without mteb: batches as its collator makes them."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diccae.config import RunConfig, config_text
from diccae.integrations.mteb import DiccaeEncoder
from pipeline.config import FeatureSpec
from training.config import EncoderConfig, FbankStatistics
from training.errors import TrainingError
from training.model.encoder import Encoder, InputShape
from training.weights.files import save_encoder

SPEC = FeatureSpec(n_frames=2, frame_size=64, fbank_frames=128, n_mels=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    config = EncoderConfig(preset="tiny", dim=16, n_heads=2)
    (folder / "config.yaml").write_text(config_text(RunConfig(encoder=config, features=SPEC)))
    shape = InputShape(SPEC.fbank_frames, SPEC.n_mels, SPEC.frame_size)
    encoder = Encoder(config, shape).eval()
    save_encoder(
        encoder,
        str(folder / "encoder"),
        feature_spec=SPEC.model_dump(),
        statistics=FbankStatistics(-5.0, 4.0),
    )
    return folder


class _Loader:
    """The rows of a data set in batches, as torch's loader with mteb's collator gives them."""

    def __init__(self, rows: list[dict[str, Any]], batch: int = 3) -> None:
        self.rows, self.batch, self.collate_fn = rows, batch, None
        self.dataset = SimpleNamespace(features=rows[0])

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.rows), self.batch):
            assert self.collate_fn is not None
            yield self.collate_fn(self.rows[start : start + self.batch])


def _collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _rows(n: int, *columns: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        wave = rng.normal(size=int(16000 * (0.01 + 0.4 * i))).astype(np.float32)
        row = {
            "audio": {"array": wave, "sampling_rate": 16000},
            "video": torch.from_numpy(rng.integers(0, 255, (1 + i, 3, 48, 80), dtype=np.uint8)),
            "text": "a dog",
        }
        rows.append({name: row[name] for name in columns})
    return rows


def _encode(model: DiccaeEncoder, rows: list[dict[str, Any]], batch: int = 3) -> np.ndarray:
    task = SimpleNamespace(name="AnyTask")
    return model.encode(_Loader(rows, batch), task_metadata=task, hf_split="test", hf_subset="x")


def test_each_side_has_its_stream_and_batches_change_nothing(run: Path) -> None:
    model = DiccaeEncoder(str(run), device="cpu", collate=_collate)
    found = {}
    for columns in (("audio",), ("video",), ("audio", "video")):
        rows = _rows(5, *columns)
        found[columns] = _encode(model, rows)
        np.testing.assert_allclose(np.linalg.norm(found[columns], axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(found[columns], _encode(model, rows, batch=1), atol=1e-5)
        other = _encode(model, rows[::-1])
        assert np.abs(other - found[columns]).max() > 1e-3, "clips differ"
    fused = found["audio", "video"]
    assert all(np.abs(fused - found[side,]).max() > 1e-3 for side in ("audio", "video"))
    cosines = model.similarity(found["audio",], found["video",])
    assert cosines.shape == (5, 5)
    pairs = model.similarity_pairwise(found["audio",], found["video",])
    np.testing.assert_allclose(cosines.diagonal(), pairs, atol=1e-6)


def test_sound_is_normalised_with_what_the_card_says(run: Path) -> None:
    model = DiccaeEncoder(str(run), device="cpu", collate=_collate)
    assert model.data.statistics == (-5.0, 4.0)
    before = _encode(model, _rows(2, "audio"))
    model.data = model.data.model_copy(update={"fbank_mean": 0.0})
    assert np.abs(_encode(model, _rows(2, "audio")) - before).max() > 1e-3


def test_the_process_of_the_caller_stays_as_it_was(run: Path) -> None:
    """Threads of torch, and what the processes that are started later inherit."""
    before, n_threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _encode(DiccaeEncoder(str(run), device="cpu", collate=_collate), _rows(2, "audio"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(n_threads)
    assert dict(os.environ) == before


def test_what_it_cannot_encode_is_refused_by_name(run: Path) -> None:
    model = DiccaeEncoder(str(run), device="cpu", collate=_collate)
    with pytest.raises(TrainingError, match="AnyTask has columns audio, text"):
        _encode(model, _rows(2, "audio", "text"))
    rows = _rows(1, "audio")
    rows[0]["audio"]["sampling_rate"] = 44100
    with pytest.raises(TrainingError, match="sound at 44100 Hz"):
        _encode(model, rows)
