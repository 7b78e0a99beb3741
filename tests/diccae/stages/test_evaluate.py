"""The evaluation stage on an encoder without training, in this process."""

import functools
import json
from pathlib import Path

import pytest
import torch
from support.stores import noise_store

from diccae.cli import main
from diccae.config import RunConfig, config_text
from diccae.stages import evaluate
from diccae.stages.backend import InLab
from pipeline.config import FeatureSpec
from training.config import FbankStatistics
from training.lab.features import decode_store, open_features
from training.lab.lab import Lab
from training.model.encoder import Encoder
from training.model.make import input_shape
from training.weights.card import Applied
from training.weights.files import save_encoder

SPEC = FeatureSpec(n_frames=2, frame_size=32, fbank_frames=32, n_mels=16, duration_s=1.0)
CONFIG = RunConfig.model_validate(
    {
        "encoder": {"preset": "tiny", "dim": 16, "projection": 8},
        "data": {"validation_frac": 0.5, "fbank_mean": 0.0, "fbank_std": 1.0},
        "rounds": {"labels": "none"},
        "evaluate": {"split": "validation"},
    }
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with an encoder; `diccae evaluate` computes in this process."""
    store = noise_store(tmp_path / "store", SPEC, 32)
    snapshot, folder = store.snapshot(), tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config_text(CONFIG))
    pinned = {"uri": store.uri, "version": snapshot.version, "digest": snapshot.digest}
    (folder / "run.json").write_text(json.dumps({"name": "run", "store": pinned}))
    torch.manual_seed(0)
    save_encoder(
        Encoder(CONFIG.encoder, input_shape(SPEC)),
        str(folder / "encoder"),
        snapshot.classes,
        SPEC.model_dump(mode="json"),
        {"store": pinned},
        statistics=FbankStatistics(0.0, 1.0),
        applied=Applied(1, None, "h"),
    )
    decode_store(snapshot, tmp_path / "features")
    backend = InLab(Lab(open_features(tmp_path / "features", SPEC)))
    here = functools.partial(evaluate.run_evaluate, backend=backend)
    monkeypatch.setattr(evaluate, "run_evaluate", here)
    return folder


def test_no_number_of_the_evaluation_before_stays_beside_those_of_this_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A classifier that is gone since, and predictions that VGGSounder's numbers were of."""
    before = {"top1": {"fusion": 0.99}, "map": {"fusion": 0.99}, "vggsounder": {"n_clips": 7}}
    kept = {"encoder": "tiny", "pseudo_labels": {"nmi": 0.5}}
    seconds = {"pretrain": 3.0, "evaluate": 1e6}
    file = run / "results.json"
    file.write_text(json.dumps({**before, **kept, "probe": {"old": 1.0}, "seconds": seconds}))
    n_threads = torch.get_num_threads()
    assert main(["evaluate", "--out", str(run), "--json"]) == 0
    torch.set_num_threads(n_threads)
    printed = capsys.readouterr()
    found = json.loads(file.read_text())
    assert json.loads(printed.out) == found
    assert before.keys() & found.keys() == set()
    assert {name: found[name] for name in kept} == kept
    assert set(found["probe"]) == {"audio", "video", "fusion", "audio_video"}
    assert found["seconds"]["pretrain"] == 3.0
    assert found["seconds"]["evaluate"] < 1e6
    assert "evaluate --reuse --vggsounder measures them again" in printed.err
