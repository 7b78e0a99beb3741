"""Fine-tuning that is started again before it has a checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import SMOKE, lines

from diccae.stages.backend import InLab, OnRay
from training.tracking.client import mlflow_client


def _start_from_nothing(diccae: Callable[..., str], out: Path, *arguments: str) -> dict[str, Any]:
    """Fine-tune after a start that got to no checkpoint. Returns: the folder's MLflow run."""
    for name in ("finetune", "classifier"):
        shutil.rmtree(out / name, ignore_errors=True)
    diccae("finetune", "--out", str(out), "--finetune.epochs", "1", *arguments)
    run: dict[str, Any] = json.loads((out / "run.json").read_text())["mlflow"]
    return run


@pytest.mark.usefixtures("in_lab")
def test_a_start_with_other_settings_leaves_mlflow_the_points_of_the_one_before(
    store: str, tmp_path: Path, diccae: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stayed, as the first points of the new curve. Equal settings have equal points."""
    monkeypatch.setattr(InLab, "track", OnRay.track)
    monkeypatch.setattr(InLab, "attach", OnRay.attach)
    out, begun = tmp_path / "run", ["--store", store, "--config", SMOKE]
    first = _start_from_nothing(diccae, out, *begun)
    assert _start_from_nothing(diccae, out, *begun) == first
    again = _start_from_nothing(diccae, out, *begun, "--finetune.optim.lr", "0.003")
    assert again["run_id"] != first["run_id"]
    client = mlflow_client(again["uri"])
    history = client.get_metric_history(again["run_id"], "finetune/loss")
    told = {point.step: point.value for point in history}
    assert told == {line["step"]: line["finetune/loss"] for line in lines(out / "finetune.jsonl")}
    tags = client.get_run(again["run_id"]).data.tags
    assert tags["fine_tuned_again_after"] == first["run_id"]
