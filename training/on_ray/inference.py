"""What a trained model says of every clip of a split, over Ray Data actors.

The edge between saved models and arrays: knows nothing of metrics. Invariant: no randomness; rows
come back in the order of the index, whatever the number of actors.

Shapes: N clips, F frames a pass sees, D token width, P projection, C classes.
"""

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.config import STREAMS, DataConfig, ScaleConfig
from training.data.augment import normalise_fbank, normalise_frames
from training.data.order import FrameDraw, window_of
from training.data.reader import Batch, read_window
from training.data.rows import RowIndex
from training.model.classifier import Classifier
from training.model.encoder import Encoder
from training.weights.files import absolute_uri, load_classifier, load_encoder

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
    def __call__(self, batch: Batch, n_passes: int, classify: bool = True) -> Outputs:
        """Means over `n_passes` passes, each with its own F of the batch's frames.

        Args: classify: whether the classifier, if there is one, is applied too.
        """
        classifier = self.classifier if classify else None
        fbank = torch.from_numpy(np.array(batch.fbank)).to(self.device)
        fbank = normalise_fbank(fbank, self.data)
        trunks = self._trunks(classifier)
        heard = {name: model.audio_tokens(fbank) for name, model in trunks.items()}
        sums: dict[str, Tensor] = {}
        for i in range(n_passes):
            frames = torch.from_numpy(np.array(batch.frames[:, i::n_passes])).to(self.device)
            seen = normalise_frames(frames)
            tokens = {
                name: {"audio": heard[name], "video": model.video_tokens(seen)}
                for name, model in trunks.items()
            }
            for name, value in self._one_pass(fbank, seen, tokens, classifier).items():
                sums[name] = sums.get(name, 0) + value.float() / n_passes
        return {name: value.cpu().numpy() for name, value in sums.items()}

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
    ) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if self.encoder is not None:
            z, h, _ = self.encoder.encode(tokens["encoder"])
            out |= {f"z.{s}": x for s, x in z.items()} | {f"h.{s}": x for s, x in h.items()}
        if classifier is not None:
            if "classifier" in tokens:
                logits = classifier.logits_of(tokens["classifier"])
            else:
                logits = classifier(fbank, frames)
            out |= {f"p.{stream}": x.softmax(1) for stream, x in logits.items()}
        return out


def test_passes(n_stored: int, frames_per_clip: int, wanted: int | None) -> int:
    """Passes over a clip at test time: its stored frames, F at a time."""
    most = max(1, n_stored // frames_per_clip)
    return most if wanted is None else max(1, min(most, wanted // frames_per_clip))


class Part(NamedTuple):
    """Clips that a model is applied to."""

    rows: RowIndex
    classify: bool = True
    """Whether the classifier, if there is one, is applied too."""


class _Worker:
    """A Ray Data actor: reads, decodes and runs a piece of the parts."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import ray

        data = DataConfig.model_validate(settings["data"])
        self.parts: list[Part] = ray.get(settings["parts"][0])
        device = "cuda" if settings["use_gpu"] else "cpu"
        if device == "cpu":
            torch.set_num_threads(settings["threads"])
        encoder, classifier = settings["models"]
        self.model = Model(encoder, classifier, data, device)
        self.frames, self.wanted = data.frames_per_clip, settings["frames"]

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """Rows of any parts to one row a part: their positions and outputs as bytes."""
        rows: dict[str, list[Any]] = {"part": [], "outputs": []}
        for number in np.unique(batch["part"]).tolist():
            part = self.parts[number]
            positions = np.asarray(batch["position"][batch["part"] == number], np.int64)
            n_passes = test_passes(part.rows.spec.n_frames, self.frames, self.wanted)
            frames = FrameDraw(self.frames * n_passes, random=False)
            (decoded,) = read_window(window_of(part.rows, positions[None], frames))
            outputs = self.model(decoded, n_passes, part.classify)
            rows["part"].append(number)
            rows["outputs"].append(pickle.dumps({"position": positions, **outputs}))
        return rows


def run_model(
    index: RowIndex,
    encoder: str | None,
    classifier: str | None,
    data: DataConfig,
    scale: ScaleConfig,
    frames: int | None = None,
) -> Outputs:
    """`run_parts` for one index."""
    return run_parts([Part(index)], encoder, classifier, data, scale, frames)[0]


def run_parts(
    parts: Sequence[Part],
    encoder: str | None,
    classifier: str | None,
    data: DataConfig,
    scale: ScaleConfig,
    frames: int | None = None,
    batch_rows: int = 64,
) -> list[Outputs]:
    """Outputs of the model for every row of each index, in its order, by one pool of actors.

    Args: encoder, classifier: folders or URIs of saved models; frames: see EvaluateConfig.frames.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    settings = {
        "data": data.model_dump(),
        "parts": [ray.put(list(parts))],
        "models": [uri and absolute_uri(uri) for uri in (encoder, classifier)],
        "use_gpu": scale.use_gpu,
        "threads": scale.threads_per_worker or max(1, int(scale.cpus_per_worker)),
        "frames": frames,
    }
    items = [
        {"part": number, "position": i}
        for number, part in enumerate(parts)
        for i in range(len(part.rows))
    ]
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
    pieces: list[list[Outputs]] = [[] for _ in parts]
    for row in results.iter_rows():
        pieces[row["part"]].append(pickle.loads(row["outputs"]))
    return [_in_order(of_part) for of_part in pieces]


def _in_order(pieces: list[Outputs]) -> Outputs:
    order = np.argsort(np.concatenate([piece["position"] for piece in pieces]))
    names = [name for name in pieces[0] if name != "position"]
    return {name: np.concatenate([piece[name] for piece in pieces])[order] for name in names}


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
    units = {s: unit(outputs[f"{space}.{s}"]) for s in STREAMS}
    vectors = units | {"embedding": unit(units["audio"] + units["video"])}
    for name, x_NP in vectors.items():
        flat = pa.array(np.ascontiguousarray(x_NP, np.float32).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, x_NP.shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def unit(x_NP: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows scaled to unit length; rows of zeros stay."""
    return x_NP / np.maximum(np.linalg.norm(x_NP, axis=1, keepdims=True), 1e-12)
