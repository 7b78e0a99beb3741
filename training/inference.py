"""What a trained model says of every clip of a split, over Ray Data actors.

The edge between saved models and arrays: knows nothing of metrics. Invariant: no randomness; rows
come back in the order of the index, whatever the number of actors.

Shapes: N clips, F frames a pass sees, D token width, P projection, C classes.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.augment import normalise_fbank, normalise_frames
from training.batches import Batch, RowIndex, Views, WindowReader
from training.config import STREAMS, DataConfig, ScaleConfig
from training.encoder import Encoder
from training.weights import absolute_uri, load_classifier, load_encoder

Outputs = dict[str, NDArray[np.float32]]
"""`z.audio` [N, D], `h.audio` [N, P], `p.audio` [N, C] (softmax mean over passes), ..."""


class Model:
    """An encoder, and a classifier if there is one, applied to decoded batches."""

    def __init__(
        self, encoder: str | None, classifier: str | None, data: DataConfig, device: str
    ) -> None:
        self.data, self.device = data, torch.device(device)
        self.encoder = load_encoder(encoder)[0].to(self.device) if encoder else None
        self.classifier = load_classifier(classifier)[0].to(self.device) if classifier else None

    @torch.no_grad()
    def __call__(self, batch: Batch, n_passes: int) -> Outputs:
        """Means over `n_passes` passes, each with its own F of the batch's frames."""
        fbank = torch.from_numpy(np.array(batch["fbank"])).to(self.device)
        fbank = normalise_fbank(fbank, self.data)
        heard = {name: model.audio_tokens(fbank) for name, model in self._trunks().items()}
        sums: dict[str, Tensor] = {}
        for i in range(n_passes):
            frames = torch.from_numpy(np.array(batch["frames"][:, i::n_passes])).to(self.device)
            for name, value in self._one_pass(fbank, normalise_frames(frames), heard).items():
                sums[name] = sums.get(name, 0) + value.float() / n_passes
        return {name: value.cpu().numpy() for name, value in sums.items()}

    def _trunks(self) -> dict[str, Encoder]:
        """Encoders whose audio tokens every pass shares."""
        trunks = {} if self.encoder is None else {"encoder": self.encoder}
        if self.classifier is not None and self.classifier.mode == "multimodal":
            trunks["classifier"] = self.classifier.encoder
        return trunks

    def _one_pass(
        self, fbank: Tensor, frames: Tensor, heard: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        tokens = {
            name: {"audio": heard[name], "video": model.video_tokens(frames)}
            for name, model in self._trunks().items()
        }
        if self.encoder is not None:
            z, h, _ = self.encoder.encode(tokens["encoder"])
            out |= {f"z.{s}": x for s, x in z.items()} | {f"h.{s}": x for s, x in h.items()}
        if self.classifier is not None:
            if "classifier" in tokens:
                logits = self.classifier.logits_of(tokens["classifier"])
            else:
                logits = self.classifier(fbank, frames)
            out |= {f"p.{stream}": x.softmax(1) for stream, x in logits.items()}
        return out


def test_passes(n_stored: int, frames_per_clip: int, wanted: int | None) -> int:
    """Passes over a clip at test time: its stored frames, F at a time."""
    most = max(1, n_stored // frames_per_clip)
    return most if wanted is None else max(1, min(most, wanted // frames_per_clip))


class _Worker:
    """A Ray Data actor: reads, decodes and runs a piece of the split."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import ray

        data = DataConfig.model_validate(settings["data"])
        self.index: RowIndex = ray.get(settings["index"][0])
        device = "cuda" if settings["use_gpu"] else "cpu"
        if device == "cpu":
            torch.set_num_threads(settings["threads"])
        encoder, classifier = settings["models"]
        self.model = Model(encoder, classifier, data, device)
        self.reader = WindowReader(self.index, 0)
        self.n_passes, self.frames = settings["n_passes"], data.frames_per_clip

    def __call__(self, batch: Batch) -> dict[str, NDArray]:
        positions = np.asarray(batch["position"], np.int64)
        views = Views(self.frames * self.n_passes, random=False)
        (decoded,) = self.reader.read(positions[None, None], views, 0)
        return {"position": positions, **self.model(decoded, self.n_passes)}


def run_model(
    index: RowIndex,
    encoder: str | None,
    classifier: str | None,
    data: DataConfig,
    scale: ScaleConfig,
    frames: int | None = None,
    batch_rows: int = 64,
) -> Outputs:
    """Outputs of the model for every row of the index, in its order.

    Args: encoder, classifier: folders or URIs of saved models; frames: see EvaluateConfig.frames.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    settings = {
        "data": data.model_dump(),
        "index": [ray.put(index)],
        "models": [uri and absolute_uri(uri) for uri in (encoder, classifier)],
        "use_gpu": scale.use_gpu,
        "threads": scale.threads_per_worker or max(1, int(scale.cpus_per_worker)),
        "n_passes": test_passes(index.spec.n_frames, data.frames_per_clip, frames),
    }
    items = [{"position": i} for i in range(len(index))]
    blocks = max(1, -(-len(items) // (batch_rows * 4)))
    with ray.data.DataContext.current(context):
        results = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
            _Worker,
            fn_constructor_kwargs={"settings": settings},
            batch_size=batch_rows,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=scale.num_workers),
            num_cpus=scale.cpus_per_worker,
            num_gpus=1 if scale.use_gpu else 0,
        )
    parts = list(results.iter_batches(batch_size=None, batch_format="numpy"))
    order = np.argsort(np.concatenate([p["position"] for p in parts]))
    names = [name for name in parts[0] if name != "position"]
    return {name: np.concatenate([p[name] for p in parts])[order] for name in names}


def write_vectors(index: RowIndex, outputs: Outputs, space: str, path: Path) -> None:
    """Parquet with the clips' `id` and `label`, and one embedding per stream.

    Columns `audio`, `video`, `fusion` (fixed-size lists of float32), and `embedding`: the
    normalised mean of audio and video, what clustering uses.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "id": pa.array(index.clip_ids_N.tolist()),
        "label": pa.array([index.classes[i] if i >= 0 else None for i in index.labels_N]),
    }
    unit = {s: _unit(outputs[f"{space}.{s}"]) for s in STREAMS}
    vectors = unit | {"embedding": _unit(unit["audio"] + unit["video"])}
    for name, x_NP in vectors.items():
        flat = pa.array(np.ascontiguousarray(x_NP, np.float32).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, x_NP.shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def _unit(x_NP: NDArray[np.float32]) -> NDArray[np.float32]:
    return x_NP / np.maximum(np.linalg.norm(x_NP, axis=1, keepdims=True), 1e-12)
