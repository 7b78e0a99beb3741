"""`diccae ablate` on a real cluster: a warm-up, a variant from it, and what is left behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import N_TEST, N_TRAIN, SMOKE, lines

from diccae.cli import main

Diccae = Callable[..., str]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture
def arguments(store: str, out: Path) -> list[str]:
    return ["ablate", "--config", SMOKE, "--store", store, "--out", str(out), "--seeds", "1"]


def test_a_variant_starts_where_the_warmup_ended(
    diccae: Diccae, arguments: list[str], out: Path
) -> None:
    printed = diccae(*arguments, "--variants", "no_fusion", "--pretrain.log-every", "1")
    assert "no_fusion" in printed
    assert f"{N_TEST} test clips" in printed
    steps = {
        name: [int(line["step"]) for line in lines(out / "seed-0" / name / "metrics.jsonl")]
        for name in ("warmup", "no_fusion")
    }
    per_epoch = N_TRAIN // 32
    assert steps["warmup"] == list(range(1, per_epoch + 1))
    assert steps["no_fusion"] == list(range(per_epoch + 1, 3 * per_epoch + 1))
    last = lines(out / "seed-0" / "no_fusion" / "metrics.jsonl")[-1]
    assert last["labelled_frac"] == 1.0, "the round of the warm-up's features never came"
    content = json.loads((out / "ablation.json").read_text(), parse_constant=pytest.fail)
    assert content["variants"]["no_fusion"]["sd"] is None, "one seed has no deviation"
    assert content["pinned"]["metric"] == "probe/audio_video"
    assert 0 <= content["variants"]["no_fusion"]["mean"] <= 1
    assert (out / "ablation.png").exists()
    _check_mlflow(content["mlflow"])


def _check_mlflow(mlflow: dict[str, str]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(mlflow["uri"])
    parent = client.get_run(mlflow["run_id"])
    assert parent.info.status == "FINISHED"
    assert "mean/no_fusion" in parent.data.metrics
    runs = client.search_runs([parent.info.experiment_id])
    of_parent = {
        run.info.run_name
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == mlflow["run_id"]
    }
    assert of_parent == {"seed-0 warmup", "seed-0 no_fusion"}


def test_what_is_done_is_not_done_again_and_the_metric_stays(
    diccae: Diccae,
    arguments: list[str],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (out / "ablation.json").exists(), "needs the test above"
    trained: list[str] = []
    monkeypatch.setattr(
        "diccae.stages.ablate.run_pretrain", lambda folder, *_: trained.append(folder)
    )
    same = [*arguments, "--variants", "no_fusion", "--pretrain.log-every", "1"]
    assert "no_fusion" in diccae(*same)
    assert main([*same, "--metric", "knn/fusion"]) == 2
    assert "metric: probe/audio_video -> knn/fusion" in capsys.readouterr().err
    assert main([*same, "--optim.lr", "1e-3"]) == 2
    assert "optim.lr: 0.0002 -> 0.001" in capsys.readouterr().err
    assert not trained


def test_what_cannot_be_trained_is_said_before_anything_is(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*arguments, "--out", str(tmp_path / "new")]
    own = tmp_path / "variants.yaml"
    for content, said in (
        ("k64: {clustering: {k: 4000}}", "variant k64: clustering.k = 4000"),
        ("deep: {encoder: {depht: 3}}", "variant deep: unknown key encoder.depht"),
        ("full: {}", "variant 'full': a name is"),
        ("warmup: {}", "variant 'warmup': a name is"),
        ("../up: {}", "variant '../up': a name is"),
        ("a: [", "not readable as YAML"),
        ("[1]", "expected NAME: {section: {key: value}}"),
    ):
        own.write_text(content)
        assert main([*arguments, "--variants-file", str(own)]) == 2
        assert said in capsys.readouterr().err
    assert main([*arguments, "--variants-file", str(tmp_path / "none.yaml")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main([*arguments, "--metric", "top1/fusion"]) == 2
    assert "starts with one of pair_accuracy/, probe/, knn/, retrieval/" in capsys.readouterr().err
    assert main([*arguments, "--variants", "fulll"]) == 2
    assert "no variant fulll; there are instance" in capsys.readouterr().err
    assert main([*arguments, "--evaluate.split", "validation", "--variants", "full"]) == 2
    assert "data.validation_frac = 0.0 kept no labelled clip" in capsys.readouterr().err
