"""Outputs of a trained model for every clip of some splits, by one pool of Ray Data actors.

The edge between saved models and arrays: knows nothing of metrics. Invariants: no randomness; rows
come back in the order of the index, whatever the number of actors; what comes back lies in files
that the system may page out, so the driver's memory does not grow with the number of clips.

Shapes: N clips of a job, F frames a pass sees, D token width, P projection, C classes.
"""

import contextlib
import logging
import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.storage import place_of
from training.config import DataConfig, EvaluateConfig, ScaleConfig
from training.data.augment import normalise_fbank, normalise_frames
from training.data.order import FrameDraw, window_of
from training.data.reader import Batch, read_window
from training.data.rows import RowIndex
from training.evaluation.retrieval import unit_rows
from training.model.classifier import Classifier
from training.model.encoder import Encoder
from training.weights.files import absolute_uri, load_classifier, load_encoder

Space = Literal["z", "h"]
ByStream = dict[str, NDArray[np.float32]]


class Outputs(NamedTuple):
    """What a model says of N clips, means over its passes; a kind that was not asked for is {}."""

    z: ByStream
    """Token means [N, D] of the encoder's trunk."""
    h: ByStream
    """Embeddings [N, P] of its class heads."""
    p: ByStream
    """Probabilities [N, C] of the classifier."""

    def of(self, space: Space) -> ByStream:
        """The embeddings of a space."""
        return self.z if space == "z" else self.h


class Models(NamedTuple):
    """Folders or URIs of saved models."""

    encoder: str | None
    classifier: str | None = None


class Model:
    """An encoder, and a classifier if there is one, applied to decoded batches.

    Args: precision: autocast type of the trunks; probabilities are computed in fp32.
    """

    def __init__(
        self, models: Models, data: DataConfig, device: str, precision: Literal["fp32", "bf16"]
    ) -> None:
        self.data, self.device, self.precision = data, torch.device(device), precision
        encoder, classifier = models
        self.encoder = load_encoder(encoder)[0].to(self.device) if encoder else None
        self.classifier = load_classifier(classifier)[0].to(self.device) if classifier else None

    @torch.no_grad()
    def __call__(self, batch: Batch, n_passes: int, classify: bool = True) -> Outputs:
        """Means over `n_passes` passes, each with its own F of the batch's frames.

        Args: classify: whether the classifier, if there is one, is applied too.
        """
        classifier = self.classifier if classify else None
        fbank = torch.from_numpy(np.array(batch.fbank)).to(self.device)
        fbank = normalise_fbank(fbank, self.data)
        trunks = self._trunks(classifier)
        with self._numerics():
            heard = {name: model.audio_tokens(fbank) for name, model in trunks.items()}
        sums: dict[tuple[str, str], Tensor] = {}
        for i in range(n_passes):
            frames = torch.from_numpy(np.array(batch.frames[:, i::n_passes])).to(self.device)
            seen = normalise_frames(frames)
            with self._numerics():
                tokens = {
                    name: {"audio": heard[name], "video": model.video_tokens(seen)}
                    for name, model in trunks.items()
                }
                found = self._one_pass(fbank, seen, tokens, classifier)
            for key, value in found.items():
                value = value.float().softmax(1) if key[0] == "p" else value.float()
                sums[key] = sums.get(key, 0) + value / n_passes
        kinds: dict[str, ByStream] = {kind: {} for kind in Outputs._fields}
        for (kind, stream), total in sums.items():
            kinds[kind][stream] = total.cpu().numpy()
        return Outputs(**kinds)

    def _numerics(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _trunks(self, classifier: Classifier | None) -> dict[str, Encoder]:
        """Encoders whose audio tokens every pass shares."""
        trunks = {} if self.encoder is None else {"encoder": self.encoder}
        if classifier is not None and classifier.mode == "multimodal":
            trunks["classifier"] = classifier.encoder
        return trunks

    def _one_pass(
        self,
        fbank: Tensor,
        frames: Tensor,
        tokens: dict[str, dict[str, Tensor]],
        classifier: Classifier | None,
    ) -> dict[tuple[str, str], Tensor]:
        """z, h and logits, by kind of output and stream."""
        out: dict[tuple[str, str], Tensor] = {}
        if self.encoder is not None:
            z, h, _ = self.encoder.encode(tokens["encoder"])
            out |= {("z", s): x for s, x in z.items()} | {("h", s): x for s, x in h.items()}
        if classifier is not None:
            if "classifier" in tokens:
                logits = classifier.logits_of(tokens["classifier"])
            else:
                logits = classifier(fbank, frames)
            out |= {("p", stream): x for stream, x in logits.items()}
        return out


def test_passes(n_stored: int, frames_per_clip: int, wanted: int | None) -> int:
    """Passes over a clip at test time: its stored frames, F at a time."""
    most = max(1, n_stored // frames_per_clip)
    return most if wanted is None else max(1, min(most, wanted // frames_per_clip))


class Job(NamedTuple):
    """Clips, and how the models are applied to them."""

    rows: RowIndex
    frames: int | None
    """Frames averaged over, see EvaluateConfig.frames; 1 is the middle frame."""
    kinds: tuple[Literal["z", "h", "p"], ...]
    """The outputs that come back; without "p" no classifier is applied."""


class _Worker:
    """A Ray Data actor: reads, decodes and runs clips of the jobs."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import ray

        data = DataConfig.model_validate(settings["data"])
        self.jobs: list[Job] = ray.get(settings["jobs"][0])
        self.ends = np.cumsum([len(job.rows) for job in self.jobs])
        device = "cuda" if settings["use_gpu"] else "cpu"
        if device == "cpu":
            torch.set_num_threads(settings["threads"])
        self.model = Model(Models(*settings["models"]), data, device, settings["precision"])
        self.frames_per_clip = data.frames_per_clip

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """Numbers of clips, counted through all jobs, to one row a job: its outputs as bytes."""
        rows: dict[str, list[Any]] = {"job": [], "outputs": []}
        numbers = np.asarray(batch["id"], np.int64)
        job_of = np.searchsorted(self.ends, numbers, side="right")
        for at in np.unique(job_of).tolist():
            job = self.jobs[at]
            positions = numbers[job_of == at] - (self.ends[at] - len(job.rows))
            n_passes = test_passes(job.rows.spec.n_frames, self.frames_per_clip, job.frames)
            frames = FrameDraw(self.frames_per_clip * n_passes, random=False)
            (decoded,) = read_window(window_of(self.jobs[at].rows, positions[None], frames))
            outputs = self.model(decoded, n_passes, "p" in job.kinds)
            kept = {kind: getattr(outputs, kind) for kind in job.kinds}
            rows["job"].append(at)
            rows["outputs"].append(pickle.dumps((positions, kept)))
        return rows


def run_jobs(
    jobs: Sequence[Job],
    models: Models,
    data: DataConfig,
    scale: ScaleConfig,
    evaluate: EvaluateConfig,
) -> list[Outputs]:
    """Outputs for every row of each job's index, in its order."""
    gathered = [_Gathered(len(job.rows)) for job in jobs]
    for row in _rows(jobs, models, data, scale, evaluate):
        gathered[row["job"]].put(*pickle.loads(row["outputs"]))
    return [each.outputs() for each in gathered]


def _rows(
    jobs: Sequence[Job],
    models: Models,
    data: DataConfig,
    scale: ScaleConfig,
    evaluate: EvaluateConfig,
    batch_rows: int = 64,
) -> Iterator[dict[str, Any]]:
    """What the actors return, in whatever order they finish."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    settings = {
        "data": data.model_dump(),
        # In the object store once, not in the arguments of every actor.
        "jobs": [ray.put(list(jobs))],
        "models": [uri and absolute_uri(uri) for uri in models],
        "use_gpu": scale.use_gpu,
        "precision": precision_of(evaluate, scale),
        "threads": scale.threads_per_worker or max(1, int(scale.cpus_per_worker)),
    }
    n_rows = sum(len(job.rows) for job in jobs)
    blocks = max(1, -(-n_rows // (batch_rows * 4)))
    with ray.data.DataContext.current(context):
        results = ray.data.range(n_rows, override_num_blocks=blocks).map_batches(
            _Worker,
            fn_constructor_kwargs={"settings": settings},
            batch_size=batch_rows,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=scale.num_workers),
            num_cpus=scale.cpus_per_worker,
            num_gpus=1 if scale.use_gpu else 0,
        )
    yield from results.iter_rows()


def precision_of(evaluate: EvaluateConfig, scale: ScaleConfig) -> Literal["fp32", "bf16"]:
    """bf16 on GPUs, where fp32 takes ten times as long; fp32 on CPUs, which gain nothing by it."""
    return evaluate.precision or ("bf16" if scale.use_gpu else "fp32")


def paged_array(n_rows: int, width: int) -> NDArray[np.float32]:
    """An array in a file without a name: it is gone with the last reference to it.

    Raises: OSError if the folder of temporary files (TMPDIR) has no room for it.
    """
    with tempfile.TemporaryFile() as file:
        # Else a full disk is a SIGBUS at some write, and the process is gone without a word.
        os.posix_fallocate(file.fileno(), 0, n_rows * width * np.float32().nbytes)
        return np.memmap(file, np.float32, "w+", shape=(n_rows, width))


class _Gathered:
    """Outputs of one job, put in their rows as they come."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.kinds: dict[str, ByStream] = {kind: {} for kind in Outputs._fields}

    def put(self, positions: NDArray[np.int64], kinds: dict[str, ByStream]) -> None:
        """Some rows."""
        for kind, by_stream in kinds.items():
            for stream, x in by_stream.items():
                if stream not in self.kinds[kind]:
                    self.kinds[kind][stream] = paged_array(self.n_rows, x.shape[1])
                self.kinds[kind][stream][positions] = x

    def outputs(self) -> Outputs:
        """All rows."""
        return Outputs(**self.kinds)


def write_vectors(index: RowIndex, outputs: Outputs, space: Space, uri: str) -> None:
    """Parquet with the clips' `id` and `label`, and one embedding per stream, at a path or URI.

    Columns `audio`, `video`, `fusion` (fixed-size lists of float32), and `embedding`: the
    normalised mean of audio and video, what clustering uses.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "id": pa.array(index.clip_ids_N.tolist()),
        "label": pa.array([index.classes[i] if i >= 0 else None for i in index.labels_N]),
    }
    units = {s: unit_rows(x_NP) for s, x_NP in outputs.of(space).items()}
    vectors = units | {"embedding": unit_rows(units["audio"] + units["video"])}
    for name, x_NP in vectors.items():
        flat = pa.array(np.ascontiguousarray(x_NP, np.float32).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, x_NP.shape[1])
    place, name = place_of(uri)
    with place.written(name) as path:
        pq.write_table(pa.table(columns), path)
