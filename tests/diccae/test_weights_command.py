"""Published weights as a run, and a run's model for CAV-MAE, by command."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from support.stores import noise_store

from diccae.cli import main
from pipeline.config import FeatureSpec
from pipeline.errors import StoreError
from pipeline.store.maintenance import status
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.store import FeatureStore
from pipeline.store.versions import unpin
from training.config import EncoderConfig
from training.model.classifier import Classifier
from training.model.encoder import Encoder, InputShape
from training.weights.files import load_classifier, load_encoder, save_classifier, save_encoder

SPEC = FeatureSpec(n_frames=2, frame_size=32, fbank_frames=32, n_mels=128, duration_s=1.0)
SHAPE = InputShape(32, 128, 32)
SIZES = {"preset": "base", "dim": 16, "depth": 2, "n_heads": 2, "projection": 8}
CLASSES = ["class 2", "class 0", "class 3", "class 1"]
"""In another order than the store's."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a store, a config and a classifier in `model/`."""
    monkeypatch.chdir(tmp_path)
    noise_store(tmp_path / "store", SPEC, 16)
    config = {"encoder": SIZES, "loss": {"instance_on": "z"}, "rounds": {"labels": "none"}}
    Path("run.yaml").write_text(json.dumps(config))
    torch.manual_seed(0)
    classifier = Classifier(Encoder(EncoderConfig.model_validate(SIZES), SHAPE), 4)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_classifier(classifier, "model", CLASSES)
    save_encoder(classifier.encoder, "trunk")
    return tmp_path


def _import(*arguments: str) -> int:
    return main(["weights", "import", "--store", "store", "--config", "run.yaml", *arguments])


def test_exported_classifier_comes_back_in_the_order_of_the_store(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "export", "--model", "model", "--out", "to/cavmae.pth", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    written = torch.load("to/cavmae.pth", weights_only=True)
    assert told["tensors"] == len(written)
    assert "module.mlp_head.1.weight" in written
    assert (
        "import --model cavmae.pth --classes cavmae.pth.csv" in Path("to/cavmae.pth.md").read_text()
    )
    assert _import("--model", told["file"], "--classes", told["classes"], "--out", "run") == 0
    assert "layout      cavmae" in capsys.readouterr().out
    (before, _), (after, card) = load_classifier("model"), load_classifier("run/classifier")
    assert card.classes == sorted(CLASSES)
    assert card.provenance["weights"] == told["file"]
    clips = torch.randn(3, 32, 128), torch.randn(3, 1, 3, 32, 32)
    order = [CLASSES.index(name) for name in card.classes]
    with torch.no_grad():
        expected = before(*clips)["fusion"][:, order]
        torch.testing.assert_close(after(*clips)["fusion"], expected)
    assert json.loads(Path("run/run.json").read_text())["store"]["version"] >= 0


def test_without_a_label_list_the_encoder_alone_is_taken_into_a_new_folder(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "export", "--model", "trunk", "--out", "cavmae.pth"]) == 0
    assert not Path("cavmae.pth.csv").exists()
    assert _import("--model", "cavmae.pth", "--out", "run") == 0
    same = load_encoder("trunk")[0].state_dict(), load_encoder("run/encoder")[0].state_dict()
    trunk = [key for key in same[0] if not key.startswith("class_heads.")]
    assert all(torch.equal(same[0][key], same[1][key]) for key in trunk)
    assert not Path("run/classifier").exists()
    before = Path("run/encoder/encoder.json").read_bytes()
    assert _import("--model", "trunk", "--out", "run") == 2
    assert "run holds a run already" in capsys.readouterr().err
    assert Path("run/encoder/encoder.json").read_bytes() == before


def test_heads_that_nothing_trained_embed_nothing_whatever_the_config_trains(place: Path) -> None:
    Path("run.yaml").write_text(json.dumps({"encoder": SIZES, "rounds": {"labels": "none"}}))
    assert main(["weights", "export", "--model", "trunk", "--out", "cavmae.pth"]) == 0
    for model, space in (("cavmae.pth", "z"), ("trunk", "h")):  # The second brings its heads.
        assert _import("--model", model, "--out", f"of-{model}") == 0
        applied = load_encoder(f"of-{model}/encoder")[1].applied
        assert applied is not None
        assert applied.space == space


def test_a_multi_label_classifier_is_one_after_its_import(place: Path) -> None:
    assert main(["weights", "export", "--model", "model", "--out", "cavmae.pth"]) == 0
    arguments = ["--model", "cavmae.pth", "--classes", "cavmae.pth.csv"]
    assert _import(*arguments, "--out", "one") == 0
    config = json.loads(Path("run.yaml").read_text())
    Path("run.yaml").write_text(
        json.dumps({**config, "finetune": {"loss": "bce", "confusion": 0.0}})
    )
    assert _import(*arguments, "--out", "several") == 0
    logits = torch.randn(3, 4)
    several, one = (load_classifier(f"{out}/classifier")[0] for out in ("several", "one"))
    torch.testing.assert_close(several.probabilities(logits), logits.sigmoid())
    torch.testing.assert_close(one.probabilities(logits), logits.softmax(1))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("0,m,class 0\n1,m,class 1\n2,m,class 2\n3,m,class 3\n", "no class head in it"),
        ("0,m,dog\n", "4 of 4 classes are not in the source's list of 1"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_no_run(
    place: Path, labels: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("labels.csv").write_text(f"index,mid,display_name\n{labels}")
    model = "trunk" if "class 0" in labels else "model"
    assert _import("--model", model, "--classes", "labels.csv", "--out", "run") == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert not Path("run/run.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--store", "store"], 2, "export: --store: of import"),
        (["--classes", "a.csv", "--config", "run.yaml"], 2, "export: --classes, --config: of"),
        (["--out", "to/cavmae"], 1, "ends in nothing, and is read by its ending: one of .pth"),
        (["--out", "to/cavmae.safetensors"], 1, "ends in .safetensors, and is read by its ending"),
        (["--to", "hub-folder", "--out", "trunk"], 1, "trunk: holds the model of an encoder.json"),
    ],
)
def test_what_export_would_not_do_or_could_not_be_read_back_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    out = [] if "--out" in arguments else ["--out", "to/cavmae.pth"]
    assert main(["weights", "export", "--model", "model", *out, *arguments]) == code
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert not Path("to").exists()
    assert {file.name for file in Path("trunk").iterdir()} >= {"encoder.json", "README.md"}
    assert not Path("trunk/classifier.json").exists()


def test_import_takes_any_layout(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _import("--model", "trunk", "--to", "hub-folder", "--out", "run") == 2
    assert "import: --to hub-folder: of export" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_of_one_name_keep_the_versions_of_each_other(place: Path) -> None:
    store = FeatureStore.open("store")
    first = store.version()
    arguments = ["weights", "import", "--config", "run.yaml", "--store", "store"]
    arguments += ["--model", "trunk"]
    assert main([*arguments, "--out", "a/run"]) == 0
    broken = {"clip_id": "clip9000000_000000", "split": "train", "status": "failed"}
    broken["spec_hash"] = SPEC.spec_hash()
    store.append(pa.Table.from_pylist([{**broken, "reason": "timeout"}], CLIPS_SCHEMA), {})
    assert main([*arguments, "--out", "b/run"]) == 0
    about = status("store")
    old, new = (
        f"run-run-v{version}-{hashlib.sha256(of_folder.encode()).hexdigest()[:8]}"
        for version, run in ((first, "a/run"), (first + 1, "b/run"))
        for of_folder in [f"{place / run}{(place / run / 'id').read_text()}"]
    )
    assert about["pins"] == {old: first, new: first + 1}
    assert about["pinned_for"] == {old: str(place / "a/run"), new: str(place / "b/run")}
    with pytest.raises(StoreError, match=f"no pin 'run-run'; there are {old}, {new}"):
        unpin("store", "run-run")
    assert main(["store", "unpin", "--store", "store", "--pin", old]) == 0
    assert status("store")["pins"] == {new: first + 1}


@pytest.mark.slow
def test_runs_of_one_name_and_version_have_a_pin_each(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them let go of the version that both read."""
    store = FeatureStore.open("store")
    version = store.version()
    arguments = ["weights", "import", "--config", "run.yaml", "--store", "store"]
    arguments += ["--model", "trunk"]
    # As the version before this one named it, for a run that may still live.
    old = f"run-base-v{version}"
    store.pin(version, old)
    for run in ("alice/base", "bob/base"):
        assert main([*arguments, "--out", run]) == 0
    assert main(["store", "status", "--store", "store"]) == 0
    said = capsys.readouterr().out
    pins = {run: name for name, run in status("store")["pinned_for"].items()}
    assert set(pins) == {str(place / "alice/base"), str(place / "bob/base")}
    assert all(run in said for run in pins)
    assert main(["store", "unpin", "--store", "store", "--pin", pins.pop(f"{place}/bob/base")]) == 0
    assert status("store")["pins"] == {old: version, pins[f"{place}/alice/base"]: version}


@pytest.mark.slow
def test_a_run_of_a_version_that_was_vacuumed_is_refused_before_it_begins(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FeatureStore.open("store")
    gone, clips = store.version(), store.snapshot().clips
    shards = clips["shard"].to_pylist()
    for shard in set(shards):
        Path("store", shard).rename(Path("store", shard.replace("part-", "part-moved-")))
    at = clips.column_names.index("shard")
    names = pa.array([shard.replace("part-", "part-moved-") for shard in shards])
    store.append(clips.set_column(at, clips.schema.field(at), names), {})
    arguments = ["weights", "import", "--config", "run.yaml", "--store", "store"]
    arguments += ["--model", "trunk", "--out", "run", "--data.version"]
    assert main([*arguments, str(gone)]) == 1
    said = capsys.readouterr().err
    n_shards = len(set(shards))
    assert f"version {gone} was vacuumed: {n_shards} of its {n_shards} shards are gone." in said
    assert f"Whole are {gone + 1}: name one of them" in said
    assert status("store")["pins"] == {}
    assert main([*arguments, str(gone + 1)]) == 0


@pytest.mark.slow
def test_a_start_that_died_before_it_was_written_down_takes_its_own_pin_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["weights", "import", "--config", "run.yaml", "--store", "store"]
    arguments += ["--model", "trunk", "--out", "a/run"]

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr("diccae.stages.run_record.RunFolder.write_record", die)
        assert main(arguments) == 130
    begun = status("store")["pins"]
    assert len(begun) == 1
    assert main(arguments) == 0
    assert status("store")["pins"] == begun


def test_pretraining_says_what_the_weights_give_before_the_cluster_is_used(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diccae.stages.backend.start_ray", interrupted)
    assert main(["weights", "export", "--model", "trunk", "--out", "trunk.pth"]) == 0
    arguments = ["pretrain", "--config", "run.yaml", "--store", "store"]
    arguments += ["--pretrain.batch-size", "8"]
    assert main([*arguments, "--out", "new", "--init", "trunk.pth"]) == 130
    said = capsys.readouterr().err
    assert "weights   trunk.pth, read as cavmae\n" in said
    assert "missing: class_heads (18)\n" in said
    Path("bad.pth").write_text("no weights")
    assert main([*arguments, "--out", "bad", "--init", "bad.pth"]) == 1
    assert "bad.pth cannot be read as tensors alone" in capsys.readouterr().err
    assert not Path("bad/run.json").exists(), "the folder is taken"
