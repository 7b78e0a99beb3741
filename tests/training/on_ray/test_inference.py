"""Models applied to clips, without Ray: precision, memory, and where probes are fitted."""

import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from support.asked import asked_of_shards
from support.memory import SHAPE, SPEC, MemoryReader, memory_index
from support.stores import noise_store

from pipeline.errors import DamagedShard
from training.cluster_config import ScaleConfig
from training.config import DataConfig, EncoderConfig, TrainingConfig
from training.data.augment import normalise_fbank, normalise_frames
from training.data.order import BatchPlan, FrameDraw, Window, WindowPlan, window_of
from training.data.reader import Batch
from training.data.rows import RowIndex, index_rows
from training.evaluate_config import EvaluateConfig
from training.evaluation.probes import Probe
from training.model.classifier import Classifier
from training.model.encoder import Encoder
from training.on_ray import evaluate, inference
from training.on_ray.inference import run_jobs
from training.predict import jobs, runner
from training.predict.apply import Model, Models, Outputs
from training.predict.jobs import Job
from training.weights.files import save_classifier, save_encoder

_DATA = DataConfig(lanes=4, shuffle_window=8, fbank_mean=0.0, fbank_std=3.0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("encoder"))
    torch.manual_seed(0)
    config = EncoderConfig(preset="tiny", dim=32, projection=16)
    save_encoder(Encoder(config, SHAPE), folder)
    return folder


@pytest.fixture(scope="module")
def batch() -> Batch:
    index = memory_index()
    plan = BatchPlan.of(len(index), 16, _DATA)
    reader = MemoryReader(WindowPlan(index, plan, range(4), 0))
    return next(iter(reader.sweep(FrameDraw(2, random=False))))


def test_bf16_reaches_the_trunk_and_outputs_stay_close(
    encoder: str, batch: Batch, attentions: list[tuple[bool, torch.dtype]]
) -> None:
    found = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        attentions.clear()
        model = Model(Models(encoder), _DATA, "cpu", precision)
        found[precision] = model(batch.fbank, batch.frames, n_passes=2)
        assert {seen for _, seen in attentions} == {dtype}
    for space in ("z", "h"):
        for stream, x_NP in found["fp32"].of(space).items():
            y_NP = found["bf16"].of(space)[stream]
            assert y_NP.dtype == np.float32
            assert 0 < np.abs(x_NP - y_NP).max() < 0.05 * np.abs(x_NP).max()


@pytest.mark.parametrize("auxiliary", [True, False])
def test_passes_share_what_is_of_the_audio_alone(
    encoder: str,
    batch: Batch,
    auxiliary: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the bits of a mean over passes that repeat it."""
    torch.manual_seed(1)
    config = EncoderConfig(preset="tiny", dim=32, projection=16)
    made = Classifier(Encoder(config, SHAPE), 4, auxiliary=auxiliary)
    save_classifier(made, str(tmp_path), list("abcd"))
    model = Model(Models(encoder, str(tmp_path)), _DATA, "cpu", "fp32")
    join, lengths = Encoder.join, []

    def counted(self: Encoder, tokens_BLD: torch.Tensor, stream: str) -> torch.Tensor:
        lengths.append(tokens_BLD.shape[1])
        return join(self, tokens_BLD, stream)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "join", counted)
        found = model(batch.fbank, batch.frames, n_passes=2)
    assert model.encoder is not None
    n_audio, n_video = model.encoder.token_counts()
    # Without heads of its own a modality is read with its norms and with those of both.
    assert lengths.count(n_audio) == 1 + (1 if auxiliary else 2)
    assert lengths.count(n_audio + n_video) == 2 * 2
    for kind, by_stream in _repeated(model, batch)._asdict().items():
        for stream, x in by_stream.items():
            np.testing.assert_array_equal(getattr(found, kind)[stream], x)


@torch.no_grad()
def _repeated(model: Model, batch: Batch) -> Outputs:
    """The mean over two passes of one frame, each of them whole."""
    assert model.encoder is not None
    assert model.classifier is not None
    fbank = normalise_fbank(torch.from_numpy(batch.fbank), _DATA)
    kinds: dict[str, dict[str, Any]] = {kind: {} for kind in Outputs._fields}
    for i in range(2):
        seen = normalise_frames(torch.from_numpy(batch.frames[:, i::2].copy()))
        z, h, _ = model.encoder(fbank, seen)
        logits = model.classifier.stream_logits(fbank, seen)
        p = {s: model.classifier.probabilities(x) for s, x in logits.items()}
        for kind, by_stream in (("z", z), ("h", h), ("p", p)):
            for stream, x in by_stream.items():
                kinds[kind][stream] = kinds[kind].get(stream, 0) + x / 2
    return Outputs(**kinds)


@pytest.mark.parametrize("mode", ["audio", "video"])
def test_a_classifier_of_one_modality_answers_for_it(
    mode: Any, batch: Batch, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    config = EncoderConfig(preset="tiny", dim=32, projection=16)
    save_classifier(Classifier(Encoder(config, SHAPE), 4, mode), str(tmp_path), list("abcd"))
    model = Model(Models(None, str(tmp_path)), _DATA, "cpu", "fp32")
    found = model(batch.fbank, batch.frames, n_passes=2).p
    assert list(found) == [mode]
    np.testing.assert_allclose(found[mode].sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [
        ("cuda", None, "bf16"),
        ("cpu", None, "fp32"),
        ("cuda", "fp32", "fp32"),
        ("cpu", "bf16", "bf16"),
    ],
)
def test_a_saved_model_is_bf16_on_gpus_unless_told_otherwise(
    device: str, asked: Any, expected: str
) -> None:
    assert Model(Models(None), _DATA, device, asked).precision == expected


def _worker(
    encoder: str,
    index: RowIndex,
    monkeypatch: pytest.MonkeyPatch,
    shard_cache: str | None = None,
) -> "inference._Worker":
    """An actor of one job without Ray, which runs batches of four clips."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda ref: ref))
    monkeypatch.setattr(jobs, "_ROWS", 4)
    settings = {
        "data": _DATA.model_dump(),
        "jobs": [[Job(index, 1, ("z",))]],
        "models": [encoder, None],
        "scale": ScaleConfig(shard_cache=shard_cache, shard_cache_gib=1).model_dump(),
        "evaluate": EvaluateConfig().model_dump(),
    }
    return inference._Worker(settings)


def test_an_actor_reads_the_next_batches_while_one_runs(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those and no more, and what comes back is in order."""
    index = index_rows(noise_store(tmp_path / "store", SPEC, 32).snapshot(), "train")
    worker = _worker(encoder, index, monkeypatch)
    read, others = runner.read_window, threading.Semaphore(0)
    begun: list[int] = []

    def seen(window: Window, *cache: Any) -> Iterator[Batch]:
        begun.append(int(window.position_W[0]) // 4)
        others.release()
        return read(window, *cache)

    monkeypatch.setattr(runner, "read_window", seen)
    run, at_run = worker._runner._model, []

    def model(*given: Any) -> Outputs:
        if not at_run:
            for _ in range(1 + runner._AHEAD):
                assert others.acquire(timeout=30), "a batch runs, and the next ones are not read"
        at_run.append(len(begun))
        return run(*given)

    monkeypatch.setattr(worker._runner, "_model", model)
    rows = worker({"id": np.arange(8)})
    assert sorted(begun) == list(range(8))
    assert at_run[0] == 1 + runner._AHEAD
    assert all(n <= 1 + i + runner._AHEAD for i, n in enumerate(at_run))
    positions, kinds = zip(*map(pickle.loads, rows["outputs"]), strict=True)
    np.testing.assert_array_equal(np.concatenate(positions), np.arange(32))
    for i, (batch,) in enumerate(
        list(read(window_of(index, np.arange(4)[None] + 4 * i, FrameDraw(1, random=False))))
        for i in range(8)
    ):
        alone = run(batch.fbank, batch.frames, 1, False).z
        for stream, x in alone.items():
            np.testing.assert_array_equal(kinds[i]["z"][stream], x)


def test_an_actor_asks_storage_once_for_what_its_node_keeps(
    bucket: str, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else all of such a small shard is its end, which each who opens it has for himself.
    monkeypatch.setattr("pipeline.store.cached_file._TAIL_BYTES", 4096)
    index = index_rows(noise_store(f"{bucket}/store", SPEC, 32).snapshot(), "train")
    worker = _worker(encoder, index, monkeypatch, str(tmp_path))
    found = []
    for is_first in (True, False):
        asked_of_shards()
        found.append(worker({"id": np.arange(8)})["outputs"])
        assert bool(asked_of_shards()) == is_first
    assert found[0] == found[1]


def test_a_batch_that_cannot_be_read_is_named_when_its_turn_comes(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = noise_store(tmp_path / "store", SPEC, 32)
    index = index_rows(store.snapshot(), "train")
    worker = _worker(encoder, index, monkeypatch)
    gone = Path(store.location.join(index.shards[1]))
    gone.unlink()
    run, n_run = worker._runner._model, []

    def model(*given: Any) -> Outputs:
        n_run.append(1)
        return run(*given)

    monkeypatch.setattr(worker._runner, "_model", model)
    with pytest.raises(DamagedShard, match=re.escape(str(gone))):
        worker({"id": np.arange(8)})
    assert len(n_run) == 4, "the first shard's batches"
    assert not [t for t in threading.enumerate() if t.name.startswith("side-by-side")]


def test_memory_of_the_driver_does_not_grow_with_the_clips(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """256 MiB of outputs, in any order, cost the driver next to nothing of its own."""
    n_rows, width, piece = 32768, 2048, 1024
    starts = np.random.default_rng(0).permutation(np.arange(0, n_rows, piece))

    def rows(*_: Any) -> Iterator[dict[str, Any]]:
        for start in starts:
            positions = np.arange(start, start + piece)
            x = np.repeat(positions[:, None], width, axis=1).astype(np.float32)
            yield {"job": 0, "outputs": pickle.dumps((positions, {"z": {"audio": x}}))}

    monkeypatch.setattr(inference, "_rows", rows)
    index = memory_index()
    monkeypatch.setattr(type(index), "__len__", lambda _: n_rows)
    before = _own_bytes()
    [outputs] = run_jobs(
        [Job(index, None, ("z",))], Models(None), _DATA, ScaleConfig(), EvaluateConfig()
    )
    grown = _own_bytes() - before
    np.testing.assert_array_equal(outputs.z["audio"][:, -1], np.arange(n_rows))
    assert grown < 64 * 2**20, f"{grown / 2**20:.0f} MiB"


def _own_bytes() -> int:
    """Memory that cannot be paged out to a file of its own."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - _file_backed())


def _file_backed() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile"):
            return int(line.split()[1]) * 1024
    return 0


def test_probes_are_fitted_on_a_workers_gpu_where_training_has_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver's node has no GPU: all fits are one task that reserves one. Features are
    gigabytes: they are sent once, and Ray shares them only if they are no part of the message."""
    asked: list[dict[str, Any]] = []
    messages: list[bytes] = []
    buffers: list[pickle.PickleBuffer] = []

    def remote(**resources: Any) -> Callable[[Callable[..., Any]], Any]:
        asked.append(resources)

        def task(call: Callable[..., Any]) -> Any:
            def sent(*args: Any, **settings: Any) -> Any:
                given, beside = (args, settings), buffers.append
                messages.append(pickle.dumps(given, protocol=5, buffer_callback=beside))
                return call(*args, **settings)

            return SimpleNamespace(remote=sent)

        return task

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(remote=remote, get=lambda x: x))
    index = memory_index()
    rng = np.random.default_rng(0)
    z = {
        s: rng.normal(size=(len(index), 8)).astype(np.float32) for s in ("audio", "video", "fusion")
    }
    devices: list[str] = []

    def knn(*args: Any, device: str, **_: Any) -> np.ndarray:
        devices.append(device)
        return np.eye(4, dtype=np.float32)[np.zeros(len(args[2]), int)]

    probe = Probe("knn", "", lambda *given, config, device: knn(*given, device=device))
    monkeypatch.setattr(evaluate, "PROBES", (probe,))
    monkeypatch.setattr(evaluate, "knn_probe", knn)
    config = TrainingConfig(scale=ScaleConfig(use_gpu=True))
    outputs = Outputs(z, {}, {})
    evaluate._probe(config, index, index, outputs, outputs)
    assert devices == ["cuda"] * 5
    assert asked == [{"num_gpus": 1}]
    assert max(map(len, messages)) < 2000
    of_features = [b.raw().nbytes for b in buffers if b.raw().nbytes >= z["audio"].nbytes]
    assert of_features == [x.nbytes for x in z.values()], "a stream is sent more than once"
