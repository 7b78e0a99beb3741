"""The main job: ingest, pretraining, fine-tuning, evaluation, report; pretraining that is killed.

It is one run on Ray; what commands do with that run afterwards computes in the lab.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from support.polling import wait_until
from support.processes import ray_env
from support.runs import CONFIGS, N_TEST, N_TRAIN, SMOKE, lines

from clustering.rounds.files import rounds_at
from diccae.ablation.runs import measured_of
from diccae.cli import main
from diccae.judging.predicted import predictions_of
from diccae.run_folder import RunFolder
from training.evaluation import metrics
from training.report.ablate import variant_rows

BASELINE = str(CONFIGS / "cavmae-smoke.yaml")
Diccae = Callable[..., str]
EPOCHS = 4
N_STEPS = EPOCHS * N_TRAIN // 32


def _baseline(place: Path) -> str:
    """CAV-MAE's config without its features: the store has the mean of the channels."""
    content = yaml.safe_load(Path(BASELINE).read_text())
    del content["features"]
    (place / "baseline.yaml").write_text(yaml.safe_dump(content))
    return str(place / "baseline.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def test_an_ingest_is_a_run_in_mlflow_and_one_with_nothing_to_do_is_none(store: str) -> None:
    from mlflow.tracking import MlflowClient

    place = Path(store).parent
    uri = f"sqlite:///{place}/mlflow.db"
    source = ["--clips", f"{place}/clips/clips.csv", "--videos", f"{place}/clips/videos"]
    assert main(["ingest", *source, "--store", store, "--tracking.uri", uri]) == 0
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("diccae").experiment_id
    [run] = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert run.data.params["features.frame_size"] == "64"
    assert run.data.tags["store.uri"] == store
    n_clips = N_TRAIN + N_TEST
    assert (run.data.metrics["ok"], run.data.metrics["new"]) == (n_clips, n_clips)
    assert run.data.metrics["version"] >= 1
    committed = client.get_metric_history(run.info.run_id, "committed")
    assert (committed[-1].step, committed[-1].value) == (n_clips, n_clips)


def _pretraining(store: str, place: Path, out: str) -> list[str]:
    arguments = ["pretrain", "--config", SMOKE, "--store", os.path.relpath(store, place)]
    arguments += ["--out", out, "--pretrain.log-every", "1"]
    return [*arguments, "--pretrain.epochs", str(EPOCHS)]


def _check_pretraining(out: Path) -> None:
    """Each step once, and labels among them."""
    told = lines(out / "metrics.jsonl")
    assert [int(line["step"]) for line in told] == list(range(1, N_STEPS + 1))
    assert any("clustering/nmi" in line for line in told)


def _kill_after_checkpoint(arguments: list[str], place: Path, out: Path) -> None:
    """SIGKILL a driver on this test's cluster once a checkpoint is on storage and steps go on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "diccae", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=place,
        env=ray_env(),
    )
    saved = functools.partial((out / "pretrain").glob, "checkpoint_*/state.pt")
    wait_until(lambda: any(saved()), 400, "a checkpoint", running=process)
    process.kill()
    process.wait()


def test_a_run_is_trained_fine_tuned_measured_and_reported(
    ray_session: None, place: Path, store: str, diccae: Diccae, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    out = place / "run"
    diccae(*_pretraining(store, place, "run"))
    _check_pretraining(out)
    diccae("finetune", "--out", "run")
    diccae("evaluate", "--out", "run")
    _check_vectors(diccae, store, out)
    page = Path(diccae("report", "--out", "run").strip())
    assert page.stat().st_size > 50_000
    strict = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    _check_results(strict)
    _check_predictions(out, strict)
    _check_mlflow(out)
    shutil.copytree(out, place / "finished")  # Later tests fine-tune the run again.


@pytest.mark.slow
def test_killed_pretraining_goes_on(
    ray_session: None, place: Path, store: str, diccae: Diccae, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    arguments = _pretraining(store, place, "killed")
    _kill_after_checkpoint(arguments, place, place / "killed")
    diccae(*arguments)
    _check_pretraining(place / "killed")
    _check_mlflow(place / "killed")


def _space(out: Path) -> str:
    """The embeddings of a run's encoder that evaluation compares."""
    return str(json.loads((out / "encoder" / "encoder.json").read_text())["applied"]["space"])


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("in_lab")
def test_a_finished_run_repeated_keeps_its_results(
    place: Path, diccae: Diccae, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = json.loads(Path("run/results.json").read_text())
    assert before["pretraining"]["loss"] > 0
    changed = yaml.safe_load(Path(SMOKE).read_text())
    changed["finetune"]["mixup"] = 0.25
    Path("changed.yaml").write_text(yaml.safe_dump(changed))
    arguments = ["pretrain", "--config", "changed.yaml", "--store", before["store"]["uri"]]
    arguments += ["--out", "run", "--pretrain.log-every", "1", "--pretrain.epochs", str(EPOCHS)]
    diccae(*arguments)
    after = json.loads(Path("run/results.json").read_text())
    assert after["pretraining"] == before["pretraining"]
    assert after["seconds"]["cluster"] == before["seconds"]["cluster"]
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["finetune"]["mixup"] != 0.25, "not what the classifier was made with"


@pytest.mark.usefixtures("in_lab")
def test_fine_tuning_with_other_settings_trains_or_is_refused_by_key(
    place: Path,
    diccae: Diccae,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    out = Path("run")
    model = out / "classifier" / "classifier.safetensors"
    config, before = (out / "config.yaml").read_text(), _sha(model)
    changed = ["finetune", "--out", "run", "--finetune.optim.lr", "0.003"]
    assert main(changed) == 2
    said = capsys.readouterr().err
    assert "finetune.optim.lr: 0.0001 -> 0.003" in said
    assert "--fresh" in said
    assert (out / "config.yaml").read_text() == config
    diccae("finetune", "--out", "run")
    assert _sha(model) == before, "the same command changes nothing"
    first = json.loads((out / "run.json").read_text())["mlflow"]
    diccae(*changed, "--fresh")
    assert _sha(model) != before
    _check_mlflow_of_another_fine_tuning(out, first)
    assert yaml.safe_load((out / "config.yaml").read_text())["finetune"]["optim"]["lr"] == 0.003


@pytest.mark.usefixtures("in_lab")
def test_settings_that_do_nothing_in_so_few_epochs_are_said(
    place: Path,
    store: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And not refused: a few epochs of a recipe are how it is tried."""
    encoder = ["--store", store, "--encoder", str(place / "run" / "encoder")]
    start = ["finetune", "--out", str(tmp_path / "tried"), "--config", SMOKE, *encoder]
    once = ["--finetune.epochs", "1", "--finetune.average-from-epoch", "2"]
    assert main([*start, *once, "--finetune.confusion", "1"]) == 0
    said = capsys.readouterr().err
    assert "warning   finetune.confusion = 1 does nothing: its weights apply after" in said
    assert "warning   finetune.average_from_epoch = 2 does nothing" in said
    start[2] = str(tmp_path / "used")
    assert main([*start, "--finetune.epochs", "2", "--finetune.average-from-epoch", "2"]) == 0
    assert "does nothing" not in capsys.readouterr().err


@pytest.mark.usefixtures("in_lab")
def test_another_encoder_is_fine_tuned_in_a_new_folder_and_evaluated(
    place: Path, store: str, diccae: Diccae, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "other"
    in_z = yaml.safe_load(Path(SMOKE).read_text())
    in_z["loss"]["instance_on"] = "z"
    (place / "in-z.yaml").write_text(yaml.safe_dump(in_z))
    arguments = ["finetune", "--out", str(out), "--store", store, "--config", f"{place}/in-z.yaml"]
    diccae(*arguments, "--encoder", str(place / "run" / "encoder"))
    assert _space(out) == "h", "as it was trained, not as this config would"
    diccae("evaluate", "--out", str(out))
    results = json.loads((out / "results.json").read_text())
    assert set(results["top1"]) == {"audio", "video", "fusion"}
    assert set(results["probe"]) >= {"audio", "video", "fusion"}
    assert _sha(out / "encoder" / "encoder.safetensors") == _sha(
        place / "run" / "encoder" / "encoder.safetensors"
    )
    untrained = place / "untrained"
    diccae("finetune", "--out", str(untrained), "--store", store, "--config", SMOKE)
    assert _space(untrained) == "z", "heads that nothing trained"
    again = ["finetune", "--out", str(out), "--encoder", str(untrained / "encoder")]
    assert main(again) == 2
    assert "other settings: encoder: " in capsys.readouterr().err


def test_predictions_are_those_that_evaluation_kept(
    place: Path, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the source clips, without the store; negative control: another number of frames."""
    out, videos = place / "finished", Path(store).parent / "clips" / "videos"
    kept = pq.read_table(out / "evaluation" / "predictions.parquet").to_pylist()[:6]
    clips = [str(videos / f"{row['clip_id']}.mp4") for row in kept]
    vectors = ["--embeddings", str(tmp_path / "vectors.parquet")]
    capsys.readouterr()
    assert main(["predict", "--model", str(out), "--json", *vectors, *clips]) == 0
    found = json.loads(capsys.readouterr().out)["clips"]
    classes = yaml.safe_load((out / "classifier" / "classifier.json").read_text())["classes"]
    for clip, row in zip(found, kept, strict=True):
        for stream, answer in clip["streams"].items():
            assert answer["classes"][0]["name"] == classes[row[f"pred_{stream}"]]
        assert clip["p"] == pytest.approx(row["p_fusion"], abs=1e-6)
    embedded = np.load(out / "evaluation" / "embeddings.npz")["audio"][:6]
    unit = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    table = pq.read_table(tmp_path / "vectors.parquet")
    np.testing.assert_allclose(np.stack(table["audio"].to_numpy()), unit, atol=1e-6)
    _check_confusions(found, json.loads((out / "results.json").read_text())["confusion"])

    shutil.copytree(out / "classifier", tmp_path / "model")
    measured = json.loads((tmp_path / "model" / "measured.json").read_text())
    measured["applied"]["frames"] = 1
    (tmp_path / "model" / "measured.json").write_text(json.dumps(measured))
    assert main(["predict", "--model", str(tmp_path / "model"), "--json", clips[0]]) == 0
    [other] = json.loads(capsys.readouterr().out)["clips"]
    assert other["p"] != pytest.approx(kept[0]["p_fusion"], abs=1e-5)


def _check_confusions(found: list[dict[str, Any]], confusion: dict[str, Any]) -> None:
    """A class of the worst pair is said to be confused with the other one, to the same degree."""
    worst_of: dict[str, tuple[str, float]] = {}
    for first, second, degree in confusion["worst_pairs"]:
        worst_of.setdefault(first, (second, degree))
        worst_of.setdefault(second, (first, degree))
    told = [(c["class"], c["confused_with"]) for c in found if c["class"] in worst_of]
    assert told
    for name, confused in told:
        assert confused["degree"] == pytest.approx(worst_of[name][1])


def _check_vectors(diccae: Diccae, store: str, out: Path) -> None:
    """`embed` writes the embeddings that `evaluate` kept, each of length 1."""
    arguments = ["--store", store, "--encoder", str(out / "encoder")]
    diccae("embed", *arguments, "--split", "test", "--out", "vectors.parquet")
    table = pq.read_table("vectors.parquet")
    kept = np.load(out / "evaluation" / "embeddings.npz")
    assert table["id"].to_pylist() == kept["clip_ids"].tolist()
    for stream in ("audio", "video", "fusion"):
        unit = kept[stream] / np.linalg.norm(kept[stream], axis=1, keepdims=True)
        np.testing.assert_allclose(np.stack(table[stream].to_numpy()), unit, atol=1e-5)


def _check_results(results: dict[str, Any]) -> None:
    for name in ("top1", "top5", "probe", "knn"):
        both = {"audio_video"} if name in ("probe", "knn") else set()
        assert set(results[name]) == {"audio", "video", "fusion"} | both
        assert all(0 <= value <= 1 for value in results[name].values())
    assert (results["n_train"], results["n_test"]) == (N_TRAIN, N_TEST)
    assert results["pseudo_labels"]["k"] == 8
    assert results["store"]["version"] >= 0
    assert set(results["seconds"]) >= {"pretrain", "cluster", "finetune", "evaluate"}
    assert set(results["pair_accuracy"]) == {"audio", "video", "fusion"}
    assert all(len(pair) == 3 for pair in results["confusion"]["training_pairs"])
    by_class = results["class_accuracy"]
    assert sum(each["n_clips"] for each in by_class) == N_TEST
    right = sum(each["n_clips"] * each["fusion"] for each in by_class)
    assert right / N_TEST == pytest.approx(results["top1"]["fusion"])


def _check_predictions(out: Path, results: dict[str, Any]) -> None:
    """Probabilities of clips are those that were measured, and their recordings are known."""
    found = predictions_of(RunFolder(out), RunFolder(out).config().digest())
    assert found.about.scorer == "classifier"
    assert found.n_clips == len(set(found.groups)) == N_TEST
    for stream, scores_MC in found.scores.items():
        right = float((scores_MC.argmax(1) == found.labels_M).mean())
        assert right == pytest.approx(results["top1"][stream])
        np.testing.assert_allclose(scores_MC.sum(1), 1, atol=1e-5)


def _check_mlflow(out: Path) -> None:
    from mlflow.tracking import MlflowClient

    record = json.loads((out / "run.json").read_text())
    client = MlflowClient(record["mlflow"]["uri"])
    run = client.get_run(record["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["clustering.k"] == "8"
    history = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(history) == list(range(1, N_STEPS + 1)), "gaps or doubles"


def _check_mlflow_of_another_fine_tuning(out: Path, first: dict[str, str]) -> None:
    from mlflow.tracking import MlflowClient

    _check_mlflow(out)
    again = json.loads((out / "run.json").read_text())["mlflow"]
    client, losses = MlflowClient(first["uri"]), []
    for run in (again, first):
        history = client.get_metric_history(run["run_id"], "finetune/loss")
        losses.append([point.value for point in sorted(history, key=lambda point: point.step)])
    assert losses[0] == [line["finetune/loss"] for line in lines(out / "finetune.jsonl")]
    assert losses[0] != losses[1] != []
    tags = client.get_run(again["run_id"]).data.tags
    assert tags["fine_tuned_again_after"] == first["run_id"]


def _copied(run: Path, to: Path) -> Path:
    """A finished run whose evaluation may be made again."""
    left_out = shutil.ignore_patterns("mlartifacts", "checkpoint_*")
    return Path(shutil.copytree(run, to, ignore=left_out, dirs_exist_ok=True))


@pytest.mark.usefixtures("in_lab")
def test_retrieval_by_the_middle_frame_is_that_of_one_frame(
    place: Path, diccae: Diccae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CAV-MAE's protocol beside the mean over frames, and not instead of it."""
    monkeypatch.chdir(place)
    run = _copied(place / "run", tmp_path / "run")
    whole = json.loads((run / "results.json").read_text())
    diccae("evaluate", "--out", str(run), "--evaluate.frames", "1")
    single = json.loads((run / "results.json").read_text())
    for name, value in whole["retrieval_middle_frame"].items():
        assert single["retrieval"][name] == value
        assert single["retrieval_middle_frame"][name] == value
    ranks = [name for name in whole["retrieval"] if "rank" in name or "_r" in name]
    assert any(whole["retrieval"][n] != single["retrieval"][n] for n in ranks), "one frame only?"


@pytest.mark.usefixtures("in_lab")
def test_a_new_metric_is_one_entry(
    place: Path, diccae: Diccae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered here alone, it is measured, printed, sent to MLflow, shown and compared."""
    from mlflow.tracking import MlflowClient

    def measured(given: metrics.Evidence) -> dict[str, float]:
        return {s: len(x_MC) / (len(x_MC) + 1) for s, x_MC in given.scores.items()}

    toy = metrics.Metric("toy", "a toy", "classifier", measured, ("fusion",))
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, toy))
    monkeypatch.chdir(place)
    run = _copied(place / "run", tmp_path / "run")
    printed = diccae("evaluate", "--out", str(run))
    value = N_TEST / (N_TEST + 1)
    results = json.loads((run / "results.json").read_text())
    assert results["toy"] == dict.fromkeys(("audio", "video", "fusion"), value)
    header, _, *rows = printed.splitlines()
    assert header.split()[-1] == "toy"
    assert rows[0].split()[-1] == f"{100 * value:.1f}"
    record = json.loads((run / "run.json").read_text())["mlflow"]
    kept = MlflowClient(record["uri"]).get_run(record["run_id"]).data.metrics
    assert kept["toy/fusion"] == value
    assert "a toy</th>" in Path(diccae("report", "--out", str(run)).strip()).read_text()

    of_run = measured_of(RunFolder(run))
    header, rows = variant_rows({"full": {0: of_run}}, "probe/audio_video")
    assert rows[0][header.index("toy/fusion")] == f"{100 * value:.1f}"
    assert "toy" not in metrics.names(with_classifier=False)


@pytest.mark.usefixtures("ray_session")
def test_an_evaluation_that_cannot_fit_is_refused_at_once(
    place: Path,
    store: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    run = str(place / "run")
    embed = ["embed", "--store", store, "--encoder", f"{run}/encoder", "--out", str(tmp_path / "v")]
    for command in (["evaluate", "--out", run], embed):
        assert main([*command, "--scale.use-gpu"]) == 1
        said = capsys.readouterr().err
        assert "0 GPUs" in said
        assert "inference actors" in said


def test_another_config_in_the_same_folder_is_refused_by_key(
    place: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "run"
    assert (out / "run.json").exists()
    baseline = _baseline(place)
    assert main(["pretrain", "--config", baseline, "--store", store, "--out", str(out)]) == 2
    assert "loss.reconstruction: 0.0 -> 1.0" in capsys.readouterr().err


def test_a_store_that_is_another_one_by_now_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    record = json.loads(Path("run/run.json").read_text())
    record["store"]["digest"] = "0" * 64
    Path("copy").mkdir()
    Path("copy/run.json").write_text(json.dumps(record))
    Path("copy/config.yaml").write_text(Path("run/config.yaml").read_text())
    for command in ("finetune", "evaluate"):
        assert main([command, "--out", "copy"]) == 2
        assert "holds other clips than this run read" in capsys.readouterr().err


@pytest.mark.usefixtures("in_lab")
def test_baseline_recipe_runs_and_dry_run_says_what_it_costs(
    place: Path, store: str, diccae: Diccae
) -> None:
    out = place / "baseline"
    arguments = ["pretrain", "--config", _baseline(place), "--store", store, "--out", str(out)]
    dry = diccae(*arguments, "--dry-run")
    for name in ("parameters", "forward per clip", "memory per device", "steps", "estimated time"):
        assert name in dry
    assert not out.exists()
    diccae(*arguments)
    last = lines(out / "metrics.jsonl")[-1]
    assert last["loss_reconstruction"] > 0
    assert "loss_confusion" not in last
    assert not any(name.startswith("clustering/") for name in last)


@pytest.mark.slow
@pytest.mark.usefixtures("in_lab")
def test_a_lead_longer_than_an_epoch_is_cut_to_it_and_said(
    place: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", "--config", SMOKE, "--store", store, "--out", str(place / "lead")]
    assert main([*arguments, "--rounds.lead-steps", "20", "--pretrain.epochs", "4"]) == 0
    steps = N_TRAIN // 32
    [line] = [line for line in capsys.readouterr().err.splitlines() if "lead_steps" in line]
    assert f"labels apply {steps} steps after" in line
    assert "not rounds.lead_steps = 20" in line
    assert rounds_at(str(place / "lead" / "rounds")) == [1, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("in_lab")
def test_a_run_whose_loss_was_not_finite_goes_on_as_its_message_says(
    place: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", "--config", SMOKE, "--store", store, "--pretrain.epochs", "1"]
    arguments += ["--rounds.labels", "none", "--loss.intra", "1"]
    broken = ["--loss.temperature", "1e-45", "--out", str(place / "broken")]
    assert main([*arguments, *broken]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "lower optim.lr or optim.clip_norm usually helps, with a new --out" in said
    weights = said.split("--init ")[1].split(" if ")[0]
    assert main([*arguments, "--out", str(place / "on"), "--init", weights]) == 0
    assert "resized=[]" in capsys.readouterr().err
    begun = [json.loads((place / run / "run.json").read_text()) for run in ("broken", "on")]
    assert begun[0]["statistics"] == begun[1]["statistics"]


@pytest.mark.slow
@pytest.mark.usefixtures("in_lab")
def test_a_run_goes_on_with_what_its_errors_and_its_machines_ask_for(
    place: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", "--config", SMOKE, "--store", store, "--out", str(place / "waits")]
    arguments += ["--rounds.lead-steps", "0"]
    assert main([*arguments, "--rounds.timeout-s", "1e-9"]) == 1
    assert "Raise rounds.timeout_s" in capsys.readouterr().err
    begun = json.loads((place / "waits" / "run.json").read_text())
    changed = ["--rounds.timeout-s", "600", "--pretrain.micro-batch", "16"]
    changed += ["--pretrain.log-every", "1", "--pretrain.checkpoint-every", "1"]
    assert main([*arguments, *changed, "--clustering.k", "9"]) == 2
    assert "config: clustering.k: 8 -> 9. Use" in capsys.readouterr().err
    assert main([*arguments, *changed]) == 0
    assert "going on with the run" in capsys.readouterr().err
    steps = [line["step"] for line in lines(place / "waits" / "metrics.jsonl")]
    assert steps[-1] == 3 * N_TRAIN // 32
    kept = yaml.safe_load((place / "waits" / "config.yaml").read_text())
    assert (kept["pretrain"]["micro_batch"], kept["rounds"]["timeout_s"]) == (16, 600)
    results = json.loads((place / "waits" / "results.json").read_text())
    assert results["config_hash"] == begun["config_hash"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--clustering.k", "4000"], "clustering.k = 4000"),
        (["--data.frames-per-clip", "9"], "data.frames_per_clip = 9"),
        (["--pretrain.batch-size", "30"], "data.lanes = 4"),
        (["--pretrain.batch-size", "400"], f"only {N_TRAIN} clips"),
        (["--scale.num-workers", "5"], "data.lanes = 4 are too few for 5 workers"),
        (["--rounds.margin-nats", "0.2"], "encoder.stem = patch learns nothing"),
        (["--clustering.k", f"{N_TRAIN // 2 + 1}"], "K is at most half of that"),
        (
            ["--rounds.margin-nats", "3.5", "--loss.intra", "1"],
            "set rounds.margin_nats well below 3.47",
        ),
        (["--rounds.warmup-epochs", "3"], "lower rounds.warmup_epochs"),
        (["--loss.negatives", "local", "--data.lanes", "32"], "lower data.lanes to 16 or less"),
        (
            ["--rounds.lead-steps", "20", "--pretrain.epochs", "2"],
            "raise pretrain.epochs = 2, or lower rounds.lead_steps to 1 or less",
        ),
    ],
)
def test_what_cannot_work_is_said_before_the_cluster_is_used(
    change: list[str],
    said: str,
    place: Path,
    store: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    monkeypatch.setattr("diccae.stages.backend.start_ray", lambda: started.append("ray"))
    out = str(place / "bad")
    assert main(["pretrain", "--config", SMOKE, "--store", store, "--out", out, *change]) == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert not started
