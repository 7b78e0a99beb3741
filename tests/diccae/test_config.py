"""The root config: files, overrides, errors."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from diccae.cli import main
from diccae.commands import ablate, evaluate, finetune, ingest, pretrain, submit
from diccae.config import RunConfig, config_text, differing_keys, load_config
from diccae.errors import UsageError
from pipeline.config import FeatureSpec
from pipeline.ingest.run import IngestSummary
from pipeline.store.store import FeatureStore

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_unknown_key_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("pretrain: {epoch: 3}")
    with pytest.raises(UsageError, match=r"unknown key pretrain.epoch: did you mean epochs\?"):
        load_config(tmp_path / "c.yaml")


def test_value_out_of_range_names_key_and_value(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("loss: {temperature: -1}")
    with pytest.raises(UsageError, match=r"loss.temperature.*greater than 0, found -1"):
        load_config(tmp_path / "c.yaml")


def test_a_config_of_before_pool_had_its_section_opens(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("clustering: {k: 9, n_actors: 3, gpus_per_actor: 0.0}\npool: {n_banks: 1}")
    config = load_config(path)
    assert (config.clustering.k, config.pool.n_actors, config.pool.n_banks) == (9, 3, 1)
    assert config.pool.gpus_per_actor == RunConfig().pool.gpus_per_actor
    path.write_text("clustering: {n_actors: 65}")
    with pytest.raises(UsageError, match=r"pool.n_actors = 65 > clustering.vshards = 64"):
        load_config(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"# caf\xe9\nseed: 1", "found byte 0xe9 at 5, expected UTF-8"),
        (b"pool: 3\nclustering: {n_actors: 2}", "pool: Input should be a valid dictionary"),
    ],
)
def test_a_broken_config_is_one_line(
    content: bytes,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # A run that is not refused must not begin in the checkout.
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert main(["pretrain", "--config", str(path), "--store", "s", "--out", "o"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{path}: {said}" in err


def test_missing_file_lists_what_there_is(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.yaml", tmp_path):
        with pytest.raises(UsageError, match=f"{path}: no such config file"):
            load_config(path)


def test_a_config_can_be_in_a_bucket() -> None:
    """A job on a cluster brings no files."""
    with fsspec.open("memory://configs/mine.yaml", "w") as file:
        file.write("pretrain: {epochs: 3}")
    assert load_config("memory://configs/mine.yaml").pretrain.epochs == 3
    with pytest.raises(UsageError, match=r"memory://configs/none.yaml: no such config file"):
        load_config("memory://configs/none.yaml")


def test_preset_fills_the_fields_that_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("encoder: {preset: base, depth: 2}")
    encoder = load_config(tmp_path / "c.yaml").encoder
    assert (encoder.dim, encoder.stem, encoder.depth) == (768, "patch", 2)


_SIZES = ("stem", "dim", "depth", "joint_depth", "n_heads")


def _sizes(run: RunConfig) -> tuple:
    return tuple(getattr(run.encoder, name) for name in _SIZES)


@pytest.mark.parametrize("file", [None, "{preset: small, dim: 64, norm: weights, projection: 32}"])
def test_a_preset_on_the_command_line_brings_its_sizes(tmp_path: Path, file: str | None) -> None:
    """Only its name changed: a file, and the defaults, have all sizes already."""
    argv = ["--store", "s", "--out", "o"]
    if file is not None:
        (tmp_path / "c.yaml").write_text(f"encoder: {file}")
        argv += ["--config", str(tmp_path / "c.yaml")]
    named = pretrain.OPTIONS.parse([*argv, "--encoder.preset", "base"]).run
    assert _sizes(named) == ("patch", 768, 11, 1, 12)
    assert _sizes(pretrain.OPTIONS.parse([*argv, "--encoder.preset=tiny"]).run)[1] == 128
    if file is not None:
        assert (named.encoder.norm, named.encoder.projection) == ("weights", 32), "no sizes of it"
    given = ["--encoder.dim", "128", "--encoder.preset", "base", "--encoder.n_heads=8"]
    run = pretrain.OPTIONS.parse([*argv, *given]).run
    # 128 is also what is below it without a file.
    assert _sizes(run) == ("patch", 128, 11, 1, 8), "sizes beside the preset count"


def test_a_preset_that_there_is_not_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--store", "s", "--out", "o", "--encoder.preset", "huge"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("diccae pretrain: encoder.preset: Input should be 'tiny'")
    assert printed.count("\n") == 1


def test_a_saved_config_with_a_preset_and_other_sizes_is_read_back_unchanged(
    tmp_path: Path,
) -> None:
    argv = ["--store", "s", "--out", "o", "--encoder.preset", "base", "--encoder.dim", "96"]
    run = pretrain.OPTIONS.parse(argv).run
    (tmp_path / "config.yaml").write_text(config_text(run))
    assert load_config(tmp_path / "config.yaml") == run
    again = ["--store", "s", "--out", "o", "--config", str(tmp_path / "config.yaml")]
    assert pretrain.OPTIONS.parse(again).run == run, "a command line that names no preset"


def test_some_keys_of_the_optimiser_of_fine_tuning_leave_its_others(tmp_path: Path) -> None:
    """They became those of pretraining: a head as slow as its trunk, a decay of 0.05."""
    (tmp_path / "c.yaml").write_text("finetune: {optim: {lr: 1.0e-3}}")
    optim = load_config(tmp_path / "c.yaml").finetune.optim
    assert (optim.lr, optim.head_lr_scale, optim.weight_decay) == (1e-3, 10.0, 5e-7)


def test_command_line_goes_on_top_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("pretrain: {epochs: 3, batch_size: 64}\nfeatures: {n_frames: 4}")
    argv = ["--store", "s", "--out", "o", "--config", str(path), "--pretrain.epochs", "5"]
    run = pretrain.OPTIONS.parse(argv).run
    assert (run.pretrain.epochs, run.pretrain.batch_size, run.features.n_frames) == (5, 64, 4)


def test_an_option_of_several_values_counts_each_time_it_is_given() -> None:
    """tyro takes the last one alone: a file that was excluded first would be sent."""
    argv = ["--env", "A=1", "--env=B=2", "--exclude", "x", "y/", "--no-wait", "--exclude", "z"]
    sent = submit.OPTIONS.parse(argv)
    assert (sent.env, sent.exclude, sent.no_wait) == (("A=1", "B=2"), ("x", "y/", "z"), True)
    swept = ["--store", "s", "--out", "o", "--sweep-of", "full", "--sweep_of", "gamma0"]
    assert ablate.OPTIONS.parse(swept).sweep_of == ("full", "gamma0")
    left_out = ["--data.leave-out", "still", "--optim.lr", "1", "--data.leave-out", "silent"]
    again = pretrain.OPTIONS.parse(["--store", "s", "--out", "o", *left_out, "--optim.lr", "2"])
    assert again.run.data.leave_out == ("still", "silent")
    assert again.run.optim.lr == 2, "of one value the last one counts"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--optim.lr", "-3"], "optim.lr: Input should be greater than 0, found -3.0"),
        (["--loss.temperature=0"], "loss.temperature: Input should be greater than 0, found 0.0"),
        (["--seed", "-1"], "seed: Input should be greater than or equal to 0, found -1"),
        (["--encoder.dim", "50", "--encoder.n-heads", "4"], "encoder: "),
    ],
)
def test_a_value_out_of_range_on_the_command_line_is_one_line(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--store", "s", "--out", "o", *options]) == 2
    assert not any(tmp_path.iterdir())
    printed = capsys.readouterr().err
    assert printed.startswith(f"diccae pretrain: {said}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [["synth", "--out", "o"], ["cluster", "--vectors", "v", "--out", "o", "--k", "2"]],
    ids=lambda argv: argv[0],
)
def test_a_negative_seed_of_an_option_is_refused(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "--seed", "-1"]) == 2
    assert capsys.readouterr().err == f"diccae {argv[0]}: --seed = -1: 0 or more\n"
    assert not any(tmp_path.iterdir())


def test_malformed_command_line_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--store", "s", "--out", "o", "--pretrain.epochz", "5"]
    with pytest.raises(SystemExit) as stopped:
        pretrain.OPTIONS.parse(argv)
    assert stopped.value.code == 2
    assert "--pretrain.epochz" in capsys.readouterr().err


def test_differences_are_named_key_by_key() -> None:
    old = RunConfig()
    new = RunConfig(seed=1, loss={"temperature": 0.2})
    assert differing_keys(old, new) == ["loss.temperature: 0.05 -> 0.2", "seed: 0 -> 1"]


@pytest.mark.parametrize("folder", ["shards", "s3://bucket/shards", "/mnt/x/../s3://bucket"])
def test_a_folder_for_shards_that_is_no_disk_of_a_node_is_refused(folder: str) -> None:
    argv = ["--store", "s", "--out", "o", "--scale.shard-cache", folder]
    with pytest.raises(UsageError, match=r"scale.shard_cache.*name an absolute path"):
        pretrain.OPTIONS.parse(argv)


def test_digest_ignores_where_a_run_happens_but_not_what_it_is() -> None:
    base = RunConfig()
    assert RunConfig(scale={"num_workers": 4}).digest() == base.digest()
    elsewhere = {"shard_cache": "/mnt/a", "shard_cache_gib": 9}
    assert RunConfig(scale=elsewhere).digest() == base.digest()
    assert RunConfig(rounds={"timeout_s": 9}, pretrain={"compile": True}).digest() == base.digest()
    assert RunConfig(seed=1).digest() != base.digest()
    assert RunConfig(rounds={"lead_steps": 9}).digest() != base.digest()


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ("ingest: {shard_clips: 8}", [], None),
        ("ingest: {shard_clips: 8}", ["--features.frame-size", "64"], (3, 64)),
        ("features: {n_frames: 5}", [], (5, 224)),
    ],
)
def test_a_store_keeps_its_spec_unless_another_is_asked_for(
    tmp_path: Path,
    content: str,
    options: list[str],
    expected: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FeatureStore.create(str(tmp_path / "store"), FeatureSpec(n_frames=3))
    config = tmp_path / "some.yaml"
    config.write_text(content)
    asked: list[FeatureSpec | None] = []

    def run_ingest(clips: str, videos: str, store: str, spec: FeatureSpec, *_: Any, **__: Any):
        asked.append(spec)
        return IngestSummary(**dict.fromkeys(IngestSummary.__dataclass_fields__, 0))

    monkeypatch.setattr("diccae.stages.ingest.run_ingest", run_ingest)
    argv = ["--clips", "x.csv", "--store", str(tmp_path / "store"), "--config", str(config)]
    assert ingest.main([*argv, *options]) == 0
    assert [spec and (spec.n_frames, spec.frame_size) for spec in asked] == [expected]


def test_options_of_all_sections_go_together_on_a_store_that_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FeatureStore.create(str(tmp_path / "store"), FeatureSpec(n_frames=3))
    (tmp_path / "a.mp4").touch()
    argv = ["--videos", str(tmp_path), "--store", str(tmp_path / "store"), "--plan", "--json"]
    argv += ["--features.n-frames", "8", "--ingest.fingerprint", "sha256", "--tracking.uri", "x"]
    assert ingest.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["new"] == 1


@pytest.mark.parametrize("is_on", [True, False])
def test_a_switch_of_the_runs_own_config_is_given_whichever_way_it_stands(
    is_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words are read before the run's config is known, and then on top of it."""
    own = RunConfig(finetune={"balanced": is_on}, scale={"use_gpu": is_on})
    (tmp_path / "config.yaml").write_text(config_text(own))
    (tmp_path / "run.json").write_text('{"store": {}}')
    given: list[bool] = []

    def evaluated(args: Any, _: Any) -> dict[str, Any]:
        given.append(args.run.scale.use_gpu)
        return {}

    monkeypatch.setattr(
        finetune, "_finetune", lambda _, args, __: given.append(args.run.finetune.balanced)
    )
    monkeypatch.setattr(evaluate, "_evaluate", evaluated)
    out = ["--out", str(tmp_path)]
    for word in ("", "no-"):
        assert main(["finetune", *out, f"--finetune.{word}balanced"]) == 0
        assert main(["evaluate", *out, f"--scale.{word}use-gpu", "--json"]) == 0
    assert given == [True, True, False, False]
    for section in (["--config", str(tmp_path / "config.yaml")], []):
        assert main(["finetune", *out, *section]) == 0
    assert given[4:] == [is_on, is_on]


def test_a_switch_of_a_command_has_one_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    shown = capsys.readouterr().out
    assert "--finetune.no-balanced" in shown
    assert "--no-fresh" not in shown
