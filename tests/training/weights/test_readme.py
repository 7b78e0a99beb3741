"""The README.md beside saved weights: what hub pages read of it, and what people do."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from scipy.stats import binomtest
from support.models import CLASSES, evaluated, saved_models

from diccae.cli import main
from training.predict.find import find_models
from training.weights.files import load_classifier
from training.weights.readme import wilson


def _parsed(folder: Path) -> tuple[dict, str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_front_matter_parses_and_the_text_says_what_pins_the_model(tmp_path: Path) -> None:
    saved_models(str(tmp_path))
    front, text = _parsed(tmp_path / "classifier")
    assert front["library_name"] == "diccae"
    assert "model-index" not in front
    assert "Not evaluated yet" in text
    evaluated(tmp_path)
    front, text = _parsed(tmp_path / "classifier")
    [result] = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "vgg", "type": "feature-store", "split": "test"}
    assert {"name": "top1 fusion", "type": "accuracy", "value": 0.75} in result["metrics"]
    for said in (
        "s3://b/vgg",
        "`7`",
        "ab" * 32,
        "c0ffee",
        "| top1 | fusion | 75.0 | 59.8 to 85.8 |",
    ):
        assert said in text
    assert "| dog, barking | wolf | 25.0 | audio |" in text
    assert _parsed(tmp_path / "encoder")[0]["tags"] == ["audio-visual", "diccae", "encoder"]


def test_a_hub_folder_is_read_by_safetensors_and_by_us(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_models(str(tmp_path))
    evaluated(tmp_path)
    model, hub = str(tmp_path / "classifier"), tmp_path / "hub"
    command = ["weights", "export", "--to", "hub-folder", "--model", model, "--out", str(hub)]
    assert main(command) == 0
    assert "README.md" in capsys.readouterr().out
    with safe_open(hub / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    expected, card = load_classifier(model)
    assert all(torch.equal(tensors[key], x) for key, x in expected.state_dict().items())
    config = json.loads((hub / "config.json").read_text())
    assert [config["id2label"][str(i)] for i in range(len(CLASSES))] == CLASSES
    assert config["label2id"][CLASSES[1]] == 1
    assert _parsed(hub) == _parsed(tmp_path / "classifier")
    assert load_classifier(str(hub))[1] == card
    assert find_models(str(hub)).classifier == str(hub)


@pytest.mark.parametrize(("n_right", "n"), [(0, 10), (7, 10), (120, 120), (321, 1000)])
def test_the_interval_is_wilsons(n_right: int, n: int) -> None:
    known = binomtest(n_right, n).proportion_ci(0.95, method="wilson")
    assert wilson(n_right / n, n) == pytest.approx((known.low, known.high), abs=1e-5)
