"""What a run normalises with: found, kept with the weights, and refused when it is another."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.stores import noise_store
from support.trainers import finetune_config

from diccae.cli import main
from diccae.config import RunConfig, load_config
from diccae.errors import UsageError
from diccae.run_folder import RunFolder
from diccae.stages.run_record import pin_for, remember
from diccae.stages.statistics import for_embedding, settle
from pipeline.config import FeatureSpec
from pipeline.quality.stats import compute_stats
from pipeline.storage import Location
from training.config import EncoderConfig, FbankStatistics
from training.model.encoder import Encoder, InputShape
from training.run.finetune import starting_encoder
from training.weights.export import export_cavmae
from training.weights.files import load_encoder, read_card, save_encoder

SPEC = FeatureSpec(n_frames=2, frame_size=32, fbank_frames=32, n_mels=128, duration_s=1.0)
SIZES = {"preset": "base", "dim": 16, "depth": 2, "n_heads": 2, "projection": 8}
THEIRS = FbankStatistics(-7.5, 3.25)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a store, encoders with and without statistics, CAV-MAE's file."""
    monkeypatch.chdir(tmp_path)
    noise_store(tmp_path / "store", SPEC, 16)
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.model_validate(SIZES), InputShape(32, 128, 32))
    spec = SPEC.model_dump(mode="json")
    save_encoder(encoder, "known", feature_spec=spec, statistics=THEIRS)
    save_encoder(encoder, "first", feature_spec={**spec, "audio_channel": "first"})
    save_encoder(encoder, "old/encoder", feature_spec=spec)
    torch.save(export_cavmae(encoder, ""), "cavmae.pth")
    return tmp_path


def _settled(
    config: RunConfig, weights: str | None = None, out: str = "run"
) -> tuple[FbankStatistics, list[str]]:
    folder, said = RunFolder(out), []
    folder.open(config, fresh=False)
    data = pin_for(folder, config, "store")
    config, statistics = settle(folder, config, data, said.append, weights)
    remember(folder, config, data, statistics)
    return config.data.statistics, said


def _given(statistics: FbankStatistics) -> RunConfig:
    data = {"fbank_mean": statistics.mean, "fbank_std": statistics.std}
    return RunConfig.model_validate({"data": data})


def test_without_numbers_the_train_split_is_measured_once_and_remembered(place: Path) -> None:
    found, said = _settled(RunConfig())
    snapshot = pin_for(RunFolder("run"), RunConfig()).snapshot
    stats = compute_stats(snapshot._store, snapshot, "train")
    assert found == (stats.fbank_mean, stats.fbank_std)
    assert "split train" in said[-1]
    kept = json.loads(Path("run/run.json").read_text())["statistics"]
    assert (kept["mean"], kept["std"]) == found
    # A run goes on with what it began with, whatever the store says by now.
    kept["mean"] += 1
    RunFolder("run").write_record(statistics=kept)
    assert _settled(RunConfig()) == ((kept["mean"], kept["std"]), [])


def test_numbers_of_the_config_win(place: Path) -> None:
    assert _settled(_given(FbankStatistics(-1.0, 2.0)))[0] == (-1.0, 2.0)


@pytest.mark.parametrize(
    ("weights", "theirs"), [("known", THEIRS), ("cavmae.pth", FbankStatistics(-5.081, 4.4849))]
)
def test_a_run_takes_the_statistics_of_its_weights_and_refuses_others(
    place: Path, weights: str, theirs: FbankStatistics
) -> None:
    assert _settled(RunConfig(), weights)[0] == theirs
    with pytest.raises(UsageError) as caught:
        _settled(_given(FbankStatistics(-1.0, 2.0)), weights, "other")
    for number in (f"{theirs.mean:.4f}", f"{theirs.std:.4f}", "-1.0000", "2.0000"):
        assert number in str(caught.value)
    assert not RunFolder("other").record


def test_weights_of_an_old_run_are_taken_with_what_its_folder_says(place: Path) -> None:
    stats, said = _settled(RunConfig(), "old/encoder")
    assert any("does not say" in line for line in said)
    Path("old/config.yaml").write_text(yaml.safe_dump(_given(THEIRS).model_dump(mode="json")))
    assert stats != THEIRS
    assert _settled(RunConfig(), "old/encoder", "again")[0] == THEIRS


def test_an_old_run_goes_on_with_the_numbers_of_its_config(place: Path) -> None:
    folder = RunFolder("run")
    folder.open(_given(THEIRS), fresh=False)
    remember(folder, _given(THEIRS), pin_for(folder, _given(THEIRS), "store"))
    assert "statistics" not in folder.record
    assert _settled(RunConfig()) == (
        THEIRS,
        ["fbanks    mean -7.5000 and std 3.2500, of the config"],
    )
    assert folder.config().data.given_statistics == THEIRS


def test_weights_of_other_features_are_refused(place: Path) -> None:
    with pytest.raises(UsageError, match="audio_channel = first, in the store mean"):
        _settled(RunConfig(), "first")


def test_an_encoder_embeds_with_its_own_statistics(place: Path) -> None:
    assert for_embedding(RunConfig(), "known", SPEC).data.statistics == THEIRS
    with pytest.raises(UsageError, match=r"-7\.5000 .* -1\.0000"):
        for_embedding(_given(FbankStatistics(-1.0, 2.0)), "known", SPEC)
    with pytest.raises(UsageError, match="does not say"):
        for_embedding(RunConfig(), "old/encoder", SPEC)
    with pytest.raises(UsageError, match="audio_channel"):
        for_embedding(_given(THEIRS), "first", SPEC)


def test_an_encoder_for_clips_of_another_length_is_refused_before_anything_is_written(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diccae.stages.backend.start_ray", lambda: pytest.fail("Ray was started"))
    torch.manual_seed(0)
    longer = Encoder(EncoderConfig.model_validate(SIZES), InputShape(64, 128, 32))
    spec = {**SPEC.model_dump(mode="json"), "fbank_frames": 64, "duration_s": 2.0}
    save_encoder(longer, "longer", feature_spec=spec, statistics=THEIRS)
    arguments = ["finetune", "--store", "store", "--finetune.batch-size", "8", "--out", "run"]
    assert main([*arguments, "--encoder", "longer"]) == 2
    said = capsys.readouterr().err
    assert "longer sees clips of other sizes: fbank_frames = 64, in the store 32" in said
    assert "encoder.init" in said
    assert said.count("\n") == 1
    assert not {"run.json", "config.yaml", "encoder"} & {f.name for f in Path("run").iterdir()}
    # As the message says.
    config = finetune_config().model_copy(
        update={"encoder": EncoderConfig.model_validate({**SIZES, "init": "longer"})}
    )
    index = pin_for(RunFolder("run"), RunConfig(), "store").train
    own = starting_encoder(config, index, None, Location("run"), {})
    assert read_card(own, "encoder")[0].shape == InputShape(32, 128, 32)
    with pytest.raises(UsageError, match="fbank_frames = 64, in the store 32; ingest"):
        for_embedding(RunConfig(), "longer", SPEC)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_an_encoder_that_does_not_fit_the_features_is_refused_before_the_start(
    command: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diccae.stages.backend.start_ray", lambda: pytest.fail("Ray was started"))
    noise_store(place / "short", SPEC.model_copy(update={"fbank_frames": 8}), 16)
    Path("vit.yaml").write_text(json.dumps({"encoder": {**SIZES, "stem": "patch"}}))
    arguments = [command, "--store", "short", "--out", "run", "--config", "vit.yaml"]
    if command == "pretrain":
        arguments += ["--pretrain.batch-size", "8", "--loss.intra", "1", "--rounds.labels", "none"]
    else:
        arguments += ["--finetune.batch-size", "8"]
    assert main(arguments) == 1
    # A run that begins with fine-tuning is in MLflow by then.
    *before, said = capsys.readouterr().err.splitlines()
    assert "the encoder does not fit the store's features: " in said
    assert all(line.startswith("tracking  MLflow at ") for line in before)


def test_fine_tuning_in_lanes_of_another_batch_starts_or_names_what_to_change(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """data.lanes is fixed when pretraining starts, days before."""
    monkeypatch.setattr("diccae.stages.backend.start_ray", lambda: 1 / 0)
    arguments = ["finetune", "--store", "store", "--out", "run"]
    arguments += ["--data.lanes", "8", "--finetune.batch-size", "12"]
    with pytest.raises(ZeroDivisionError):
        main(arguments)
    capsys.readouterr()
    assert main([*arguments, "--scale.num-workers", "5"]) == 1
    said = capsys.readouterr().err
    assert "finetune.batch_size = 12 divides into 4 of data.lanes = 8" in said
    assert "a multiple of 8, or scale.num_workers 4 or less" in said
    assert said.count("\n") == 1
    assert main([*arguments, "--finetune.batch-size", "24"]) == 1
    assert "finetune.batch_size = 24, but the split has only 16" in capsys.readouterr().err


def test_imported_weights_keep_their_statistics(place: Path) -> None:
    config = {"encoder": SIZES, "loss": {"instance_on": "z"}, "rounds": {"labels": "none"}}
    Path("run.yaml").write_text(json.dumps(config))
    arguments = ["--store", "store", "--config", "run.yaml", "--model", "cavmae.pth"]
    assert main(["weights", "import", *arguments, "--out", "imported"]) == 0
    assert load_encoder("imported/encoder")[1].statistics == (-5.081, 4.4849)
    assert load_config("imported/config.yaml").data.given_statistics is None


def test_a_config_of_other_features_than_the_store_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("first.yaml").write_text("features: {audio_channel: first}\n")
    arguments = ["--store", "store", "--out", "run", "--config", "first.yaml"]
    assert main(["pretrain", *arguments]) == 2
    said = capsys.readouterr().err
    assert "features.audio_channel = first in first.yaml, mean in the store" in said
    assert not Path("run", "run.json").exists()


def test_rules_leave_train_clips_out_of_a_run_for_good(place: Path, capsys) -> None:
    config = RunConfig.model_validate({"data": {"leave_out": ["still"]}})
    assert main(["pretrain", "--store", "store", "--out", "run", "--data.leave-out", "still"]) == 1
    assert "diccae store quality --store" in capsys.readouterr().err
    assert main(["store", "quality", "--store", "store"]) == 0
    table = place / "store" / "quality" / "table.parquet"
    _mark_still(table, 5)
    folder = RunFolder("left")
    folder.open(config, fresh=False)
    data = pin_for(folder, config, "store")
    assert len(data.train) == 11
    remember(folder, config, data)
    about = folder.record["store"]["left_out"]
    assert (about["rules"], about["clips"]) == ({"still": 1}, 5)
    _mark_still(table, 9)  # A later look at the store changes nothing of a run that began.
    assert len(pin_for(folder, config).train) == 11


def _mark_still(table: Path, n: int) -> None:
    """Planted verdicts: noise is never still."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(table)
    at = rows.column_names.index("still")
    verdicts = pa.array([i < n for i in range(len(rows))])
    pq.write_table(rows.set_column(at, rows.schema.field(at), verdicts), table)
