"""Ray and the lab give the same bits: of what goes on from a warm-up, and of what a model says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.models import saved_models
from support.runs import lines
from support.stores import noise_store

from clustering.rounds.files import load_round
from diccae.config import RunConfig
from diccae.stages import backend
from diccae.stages.backend import ON_RAY, Backend, InLab
from pipeline.config import FeatureSpec
from pipeline.storage import Location
from training.attempt import UNHELD
from training.cluster_config import ScaleConfig
from training.data.rows import index_rows
from training.lab.features import decode_store, open_features
from training.lab.lab import Lab
from training.on_ray.inference import run_jobs
from training.predict.apply import Models, Outputs
from training.predict.jobs import Apply, Job
from training.predict.runner import run_here
from training.run.checkpoints import Span, newest_checkpoint
from training.run.edge import Written
from training.run.pinned import Pinned, pin

SPEC = FeatureSpec(n_frames=2, frame_size=32, fbank_frames=32, n_mels=16, duration_s=1.0)
CONFIG = RunConfig.model_validate(
    {
        "encoder": {"preset": "tiny", "dim": 32, "projection": 16},
        "data": {"lanes": 3, "shuffle_window": 8, "fbank_mean": 0.0, "fbank_std": 1.0},
        "loss": {"temperature": 0.1, "intra": 1.0, "intra_epochs": 1},
        "rounds": {"warmup_epochs": 1, "margin_nats": -9.0, "lead_steps": 2},
        "pretrain": {"epochs": 4, "batch_size": 18, "checkpoint_every": 2, "log_every": 1},
        "clustering": {
            "k": 4,
            # Noise lies close together, which a real run would be stopped for.
            "guard": {"max_mean_cosine": 1.0, "min_effective_frac": 0.0, "max_churn": 1.0},
        },
        "pool": {"n_actors": 2, "cpus_per_actor": 0.2, "cpus_per_bank": 0.1},
        "scale": {"num_workers": 1, "cpus_per_worker": 0.3, "reader_cpus": 0.1},
    }
)
N_CLIPS = 54
PER_EPOCH = N_CLIPS // CONFIG.pretrain.batch_size
TIMES = ("time", "clips_per_s", "clustering/seconds")


def _trained(
    backend: Backend, data: Pinned, out: Path, span: Span, **changes: Any
) -> dict[str, torch.Tensor]:
    config = CONFIG.model_copy(update=changes)
    written = Written(Location(out), {}, UNHELD)
    backend.pretrain(config, data, written, span)
    return load_file(out / "encoder" / "encoder.safetensors")


def _differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference of each weight that is not equal in every bit."""
    assert a.keys() == b.keys()
    unequal = [name for name in a if not torch.equal(a[name], b[name])]
    return {name: float((a[name] - b[name]).abs().max()) for name in unequal}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_from_a_warm_up_on_ray_has_the_bits_of_the_lab(tmp_path: Path) -> None:
    """As every variant of an ablation begins, and ends before the config says so."""
    store = noise_store(tmp_path / "store", SPEC, N_CLIPS)
    decode_store(store.snapshot(), tmp_path / "features")
    data = pin(str(store.uri), None, CONFIG)
    lab = InLab(Lab(open_features(tmp_path / "features", SPEC)))
    _trained(lab, data, tmp_path / "warm-up", Span(until_epoch=1))
    newest = newest_checkpoint(Location(tmp_path / "warm-up"), "pretrain")
    assert newest is not None
    span = Span(start=newest[1], until_epoch=3)
    on_ray, here = tmp_path / "ray", tmp_path / "lab"
    weights = _trained(ON_RAY, data, on_ray, span)
    assert _differing(_trained(lab, data, here, span), weights) == {}
    assert _differing(_trained(lab, data, tmp_path / "other", span, seed=1), weights)
    for number in (1, 2):
        mine, theirs = (load_round(str(out / "rounds"), number).heads for out in (here, on_ray))
        assert mine
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a.labels_N, b.labels_N)
            np.testing.assert_array_equal(a.confusion_KK, b.confusion_KK)
    logged, of_lab = lines(on_ray / "metrics.jsonl"), lines(here / "metrics.jsonl")
    assert [line["step"] for line in logged] == list(range(PER_EPOCH + 1, 3 * PER_EPOCH + 1))
    for a, b in zip(of_lab, logged, strict=True):
        same = {name for name in a if not name.startswith(TIMES)}
        assert {name: a[name] for name in same} == {name: b[name] for name in same}


def _bits(outputs: Outputs) -> dict[str, bytes]:
    return {
        f"{kind} {stream}": x.tobytes()
        for kind, by_stream in outputs._asdict().items()
        for stream, x in by_stream.items()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_models_say_the_same_bits_on_ray_in_the_lab_and_in_one_process(tmp_path: Path) -> None:
    """Of the jobs of an evaluation; the last two clips of train share a batch with another job."""
    snapshot = noise_store(tmp_path / "store", SPEC, 66).snapshot()
    decode_store(snapshot, tmp_path / "features")
    lab = InLab(Lab(open_features(tmp_path / "features", SPEC)))
    saved_models(str(tmp_path), SPEC)
    models = Models(str(tmp_path / "encoder"), str(tmp_path / "classifier"))
    train = index_rows(snapshot, "train")
    tested = train.take(np.arange(0, len(train), 3))
    jobs = [Job(tested, None, ("z", "h", "p")), Job(train, None, ("z",)), Job(tested, 1, ("h",))]

    def said(apply: Apply, jobs: list[Job]) -> list[dict[str, bytes]]:
        return [
            _bits(outputs)
            for outputs in apply(jobs, models, CONFIG.data, CONFIG.scale, CONFIG.evaluate)
        ]

    of_lab = said(lab.apply, jobs)
    assert [len(bits) for bits in of_lab] == [9, 3, 3]
    assert of_lab == said(run_jobs, jobs)
    assert of_lab == said(run_here, jobs)
    # Alone they are two clips that go through the model for themselves, which moves last digits.
    assert said(lab.apply, [jobs[1]]) != of_lab[1:2]


def test_one_worker_of_one_machine_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` and `embed` then start no Ray; anything else is asked of the cluster."""
    asked: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("run_here", "run_jobs", "start_ray"):
        monkeypatch.setattr(backend, name, lambda *_, name=name: asked.append(name))
    for name in ("check_fits", "check_reach"):
        monkeypatch.setattr(backend, name, lambda *_: None)
    here = CONFIG.scale.model_copy(update={"num_workers": 1})
    elsewhere = [here.model_copy(update=more) for more in ({"num_workers": 2}, {"use_gpu": True})]

    def done(scale: ScaleConfig) -> list[str]:
        asked.clear()
        ON_RAY.ready_to_apply({"--store": "/store"}, "/run", scale)
        ON_RAY.apply([], Models(None), CONFIG.data, scale, CONFIG.evaluate)
        return [*asked]

    assert done(here) == ["run_here"]
    assert [done(scale) for scale in elsewhere] == [["start_ray", "run_jobs"]] * 2
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert done(here) == ["start_ray", "run_jobs"]
