"""`diccae ablate`: a warm-up, a variant from it, and what is left behind.

Computed in the lab; that Ray goes on from a warm-up with the same bits is tests/diccae/stages'.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import N_TEST, N_TRAIN, SMOKE, lines
from support.stores import noise_store

from diccae.cli import main
from diccae.config import RunConfig, config_text, laid_over, load_config
from diccae.stages.backend import InLab, OnRay
from training.lab.lab import Lab

Diccae = Callable[..., str]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture
def arguments(store: str, out: Path) -> list[str]:
    return ["ablate", "--config", SMOKE, "--store", store, "--out", str(out), "--seeds", "1"]


class TrackedLab(InLab):
    """The lab, with an MLflow run for each run as on Ray."""

    track = OnRay.track


def test_a_variant_starts_where_the_warmup_ended(
    diccae: Diccae, arguments: list[str], out: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diccae.ablation.runs.ON_RAY", TrackedLab(lab))
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
        "diccae.ablation.runs.run_pretrain", lambda folder, *_, **__: trained.append(folder)
    )
    same = [*arguments, "--variants", "no_fusion", "--pretrain.log-every", "1"]
    assert "no_fusion" in diccae(*same)
    assert main([*same, "--metric", "knn/fusion"]) == 2
    assert "metric: probe/audio_video -> knn/fusion" in capsys.readouterr().err
    assert main([*same, "--optim.lr", "1e-3"]) == 2
    assert "optim.lr: 0.0002 -> 0.001" in capsys.readouterr().err
    assert not trained


def test_an_ablation_of_a_version_with_fewer_keys_is_gone_on_with(
    diccae: Diccae,
    arguments: list[str],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (out / "ablation.json").exists(), "needs the tests above"
    monkeypatch.setattr("diccae.ablation.runs.run_pretrain", pytest.fail)
    kept = yaml.safe_load((out / "config.yaml").read_text())
    table = json.loads((out / "ablation.json").read_text())
    now = table["pinned"]["config_hash"]
    assert _hash_of(kept) != now, "keys that decide nothing were part of it"
    assert kept["confusion"].pop("weights") == "degree"
    (out / "config.yaml").write_text(yaml.safe_dump(kept))
    table["pinned"]["config_hash"] = _hash_of(kept)
    assert table["pinned"]["config_hash"] != now
    (out / "ablation.json").write_text(json.dumps(table))
    same = [*arguments, "--variants", "no_fusion", "--pretrain.log-every", "1"]
    assert main([*same, "--confusion.weights", "shuffled"]) == 2
    assert "confusion.weights: degree -> shuffled" in capsys.readouterr().err
    assert "no_fusion" in diccae(*same)
    assert json.loads((out / "ablation.json").read_text())["pinned"]["config_hash"] == now


def _hash_of(kept: dict[str, Any]) -> str:
    """Of a kept config: `RunConfig.digest` of an earlier version whose keys those are."""
    elsewhere = ("scale", "pool", "tracking", "ingest")
    content = {section: keys for section, keys in kept.items() if section not in elsewhere}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def test_a_finished_run_of_what_a_variant_was_before_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its numbers stood under the new changes, and with more seeds beside those of the new ones."""
    monkeypatch.setattr("diccae.ablation.runs.run_pretrain", pytest.fail)
    recipe, store = load_config(SMOKE), str(tmp_path / "store")
    version = noise_store(Path(store), recipe.features, 128).snapshot().version
    out, own = tmp_path / "out", tmp_path / "variants.yaml"
    arguments = ["ablate", "--config", SMOKE, "--store", store, "--out", str(out), "--seeds", "1"]
    arguments += ["--variants-file", str(own), "--pretrain.log-every", "1"]
    arguments += ["--data.validation-frac", "0.3", "--evaluate.split", "validation"]
    measured = {"probe": {"audio_video": 0.5}, "n_test": N_TEST}

    def finish(folder: Path, changes: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        data = {"version": version, "validation_frac": 0.3}
        changes = {"data": data, "evaluate": {"split": "validation"}, **changes}
        config = RunConfig.model_validate(laid_over(recipe, changes))
        (folder / "config.yaml").write_text(config_text(config))
        (folder / "results.json").write_text(json.dumps(measured))

    finish(out / "seed-0" / "wide", {"loss": {"confusion": 2.0}})
    own.write_text("wide: {loss: {confusion: 0.1}}")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"variant wide: {out}/seed-0/wide is a finished run of another recipe" in said
    assert "loss.confusion: 2.0 -> 0.1. Give the variant another name" in said
    assert said.count("\n") == 1
    assert not (out / "ablation.json").exists()
    own.write_text("wide: {loss: {confusion: 2.0}}")
    assert main(arguments) == 0, "how often it logs decides nothing"
    shutil.rmtree(out / "seed-0" / "wide")
    finish(out / "seed-0" / "wide", {"loss": {"confusion": 0.1}})
    on_test = {"evaluate": {"split": "test"}}
    finish(out / "test" / "seed-0" / "wide", {"loss": {"confusion": 2.0}, **on_test})
    own.write_text("wide: {loss: {confusion: 0.1}}")
    assert main(arguments) == 2
    assert f"variant wide: {out}/test/seed-0/wide is a finished run" in capsys.readouterr().err


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
    assert "starts with one of pair_accuracy/, probe/, probe_few/, knn/" in capsys.readouterr().err
    assert main([*arguments, "--variants", "fulll"]) == 2
    assert "no variant fulll; there are instance" in capsys.readouterr().err
    assert main([*arguments, "--evaluate.split", "validation", "--variants", "full"]) == 2
    assert "data.validation_frac = 0.0 kept no labelled clip" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_side_by_side_keep_what_failed_and_test_clips_to_the_end(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "variants.yaml"
    own.write_text("hot: {optim: {lr: 1.0e+30}}")
    out = tmp_path / "out"
    arguments = ["ablate", "--config", SMOKE, "--store", store, "--out", str(out), "--seeds", "1"]
    assert main([*arguments, "--processes", "2"]) == 2
    assert "--test-clips measures the test clips" in capsys.readouterr().err
    assert main([*arguments, "--test-clips"]) == 2
    assert "--test-clips goes with --processes" in capsys.readouterr().err
    arguments += ["--data.validation-frac", "0.3", "--evaluate.split", "validation"]
    arguments += ["--processes", "2", "--variants-file", str(own)]
    swept = ["--sweep", "confusion.gamma=0", "--sweep-of", "true_labels"]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert main([*arguments, *swept]) == 1
    said = capsys.readouterr().err
    assert "2 processes of 1 threads share 1 cores" in said
    assert "seed-0/hot: FAILED: training.errors.NonFiniteLoss" in said
    content = json.loads((out / "ablation.json").read_text())
    assert list(content["failed"]) == ["seed-0/hot"]
    assert [run["variant"] for run in content["runs"]] == ["true_labels@confusion.gamma=0"]
    assert (out / "seed-0" / "hot" / "process.log").exists()
    steps = [
        line["step"]
        for line in lines(out / "seed-0" / "true_labels@confusion.gamma=0" / "metrics.jsonl")
    ]
    assert steps[0] > 1, "it did not start from the warm-up"
    assert "validation clips" in (out / "ablation.md").read_text()
    assert not (out / "test").exists()
    # Without the variant that fails: all that is left was done, but for the test clips.
    monkeypatch.setattr("diccae.ablation.runs.run_pretrain", pytest.fail)
    capsys.readouterr()
    assert main([*arguments[:-2], *swept, "--test-clips"]) == 0
    assert f"{N_TEST} test clips" in capsys.readouterr().out
    kept = json.loads((out / "ablation.json").read_text())
    assert kept["pinned"]["split"] == "validation"
