"""`doctor --config` says before a run what it would be refused for, or what would not fit."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.runs import CONFIGS, SMOKE
from support.stores import noise_store

from diccae.cli import main
from diccae.doctor import child, examine, libraries
from diccae.doctor.check import Check
from pipeline.config import FeatureSpec

GIB = 2**30


@pytest.fixture(autouse=True)
def _recipe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is examined by other tests."""
    for module in (examine.libraries, examine.machine, examine.services):
        for name in [n for n in vars(module) if n.startswith("check_") and n != "check_cluster"]:
            monkeypatch.setattr(module, name, lambda *_: Check("other", True, ""))


def _cards(monkeypatch: pytest.MonkeyPatch, *gib: float) -> None:
    """Say which GPUs torch finds."""
    found = json.dumps(["2.11", [["card", int(g * GIB)] for g in gib]])
    real = child.run
    monkeypatch.setattr(
        child, "run", lambda code, *a, **k: found if code == libraries.DEVICES else real(code, *a)
    )


def _doctor(capsys: pytest.CaptureFixture[str], file: object, *more: str) -> dict[str, Any]:
    """Checks by name."""
    main(["doctor", "--json", "--config", str(file), *more])
    checks = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {check["name"]: check for check in checks}


def _changed(folder: Path, **sections: dict[str, Any]) -> Path:
    content = yaml.safe_load(Path(SMOKE).read_text())
    for section, values in sections.items():
        content[section] = {**content.get(section, {}), **values}
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_recipe_that_fits_is_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _cards(monkeypatch)
    monkeypatch.setattr("diccae.resources.usable_cores", lambda: 16)
    store = tmp_path / "store"
    noise_store(store, FeatureSpec(**yaml.safe_load(Path(SMOKE).read_text())["features"]), 64)
    checks = _doctor(capsys, SMOKE, "--store", str(store))
    assert [c for c in checks.values() if not c["ok"]] == []
    assert "2 steps an epoch" in checks["recipe"]["detail"]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"pretrain": {"batch_size": 30}}, "does not divide into data.lanes"),
        (
            {"finetune": {"batch_size": 30}, "scale": {"num_workers": 4}},
            "finetune.batch_size = 30 divides into 2 of data.lanes = 4",
        ),
        ({"scale": {"num_workers": 5}}, "too few for 5 workers"),
        ({"rounds": {"warmup_epochs": 3}}, "lower rounds.warmup_epochs"),
        ({"clustering": {"k": 33}}, "K is at most half"),
        (
            {
                "loss": {"instance": 0, "intra": 1},
                "rounds": {"labels": "true", "margin_nats": 0.25, "warmup_epochs": 1},
            },
            "loss.instance = 0 with rounds.labels = true",
        ),
        ({"features": {"n_frames": 5}}, "features.n_frames = 5"),
    ],
)
def test_what_pretraining_would_refuse_is_said(
    sections: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _cards(monkeypatch)
    store = tmp_path / "store"
    noise_store(store, FeatureSpec(**yaml.safe_load(Path(SMOKE).read_text())["features"]), 64)
    check = _doctor(capsys, _changed(tmp_path, **sections), "--store", str(store))["recipe"]
    assert not check["ok"]
    assert said in check["detail"]
    assert check["hint"]


@pytest.mark.slow
def test_the_full_recipe_wants_weights_cards_and_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = CONFIGS / "vggsound.yaml"
    _cards(monkeypatch, 4.0)
    checks = _doctor(capsys, full)
    assert "give weights with --init" in checks["recipe"]["detail"]
    assert not checks["memory"]["ok"]
    assert "micro_batch" in checks["memory"]["hint"]
    assert not checks["place"]["ok"]
    assert "7 of the training workers" in checks["place"]["detail"]
    _cards(monkeypatch, *[80.0] * 8)
    monkeypatch.setattr("diccae.resources.usable_cores", lambda: 96)
    checks = _doctor(capsys, full, "--init", "weights.pth")
    assert [c for c in checks.values() if not c["ok"]] == []


def test_memory_is_that_of_the_fewest_workers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever sets scale.min_workers wants the run to go on with these."""
    _cards(monkeypatch, 80.0)

    def memory(**scale: int) -> str:
        sections = {"data": {"lanes": 8}, "pretrain": {"batch_size": 1024}}
        config = _changed(tmp_path, **sections, scale={"use_gpu": True, **scale})
        return str(_doctor(capsys, config)["memory"]["detail"])

    assert memory(num_workers=8) != memory(num_workers=1)
    fewer = memory(num_workers=8, min_workers=1)
    assert fewer == f"with scale.min_workers = 1: {memory(num_workers=1)}"


def test_memory_is_compared_with_the_card_the_config_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _cards(monkeypatch, 0.001)
    here = _doctor(capsys, _changed(tmp_path, scale={"use_gpu": True}))["memory"]
    assert not here["ok"]
    assert "of this machine's card" in here["detail"]
    named = _changed(tmp_path, scale={"use_gpu": True, "gpu_memory_gib": 80.0})
    there = _doctor(capsys, named)["memory"]
    assert there["ok"]
    assert "90% of 80 GiB (scale.gpu_memory_gib)" in there["detail"]
    _cards(monkeypatch, 900.0)
    named = _changed(tmp_path, scale={"use_gpu": True, "gpu_memory_gib": 0.001})
    assert not _doctor(capsys, named)["memory"]["ok"]


def test_workers_without_cards_share_the_memory_of_the_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _cards(monkeypatch)
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(total=GIB // 64))
    assert not _doctor(capsys, SMOKE)["memory"]["ok"]
