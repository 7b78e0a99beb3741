"""DiccaeEncoder: a run's encoder as mteb's benchmarks of audio and video (MVEB) call one.

Follows `EncoderProtocol` of mteb 2.26. Knows nothing of tasks. Invariant: clips go through the
feature spec, the statistics and the passes of the run's own evaluation; only which frames come is
mteb's choice, since it hands over decoded ones.

mteb is imported where it is asked for something, so that this file can be read and tested without.

Shapes: B clips, F frames of a clip, T fbank rows, M mel bins, P embedding width.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from diccae import __version__
from diccae.run_folder import RunFolder
from pipeline.config import FeatureSpec
from pipeline.decode.frames import to_square
from pipeline.decode.payload import (
    decode_jpegs,
    encode_jpeg,
    fbank_array,
    fbank_function,
    fbank_payload,
)
from training.config import DataConfig
from training.data.augment import normalise_fbank, normalise_frames
from training.errors import TrainingError
from training.predict.apply import test_passes
from training.weights.card import Applied
from training.weights.files import load_encoder

Rows = Mapping[str, Any]
Collate = Callable[[list[dict[str, Any]]], Rows]


class DiccaeEncoder:
    """The encoder of a run folder; embeddings of unit length.

    Args: model_name: the run folder. revision: of the run, for mteb's results. collate: makes a
        batch of mteb's rows; None: mteb's own, at the sample rate and number of frames of the run.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        collate: Collate | None = None,
        **_: Any,
    ) -> None:
        folder = RunFolder(model_name)
        config = folder.config()
        encoder, card = load_encoder(folder.place.uri_of("encoder"))
        if card.statistics is None or not card.feature_spec:
            raise TrainingError(
                f"{folder.uri}/encoder: does not say what features it was trained on; mteb needs "
                "an encoder that diccae pretrain or weights import wrote"
            )
        self.name, self.revision = folder.place.name, revision or config.digest()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.encoder = encoder.to(self.device)
        self.spec = FeatureSpec.model_validate(card.feature_spec)
        mean, std = card.statistics
        self.data = DataConfig(**{**config.data.model_dump(), "fbank_mean": mean, "fbank_std": std})
        self.space = Applied.of(config, card.space).space
        self.passes = test_passes(
            self.spec.n_frames, config.data.frames_per_clip, config.evaluate.frames
        )
        self._collate, self._fbank = collate, fbank_function(self.spec)
        self._scale = VideoReformatter()

    @torch.inference_mode()
    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Embeddings [N, P]: of audio, of video, or of fusion where a data set has both.

        Raises: TrainingError for a data set with neither, or with text.
        """
        has = set(inputs.dataset.features)
        sides = [side for side in ("audio", "video") if side in has]
        if not sides or "text" in has:
            raise TrainingError(
                f"{self.name}: {getattr(task_metadata, 'name', 'the task')} has columns "
                f"{', '.join(sorted(has))}; this encoder takes audio, video or both, and no text"
            )
        inputs.collate_fn = self._collate or self._collator()
        stream = "fusion" if len(sides) == 2 else sides[0]
        return np.concatenate([self._embed(batch, stream) for batch in inputs])

    def _embed(self, batch: Rows, stream: str) -> NDArray[np.float32]:
        fbank_BTM = frames_BFHWC = None
        if stream != "video":
            fbank_BTM = self._heard(batch["audio"])
        if stream != "audio":
            frames_BFHWC = self._seen(batch["video"])
        passes = self.passes if stream != "audio" else 1
        total: Tensor | float = 0.0
        for i in range(passes):
            seen = None if frames_BFHWC is None else normalise_frames(frames_BFHWC[:, i::passes])
            found = self.encoder(fbank_BTM, seen, [stream])
            of_space = found.z if self.space == "z" else found.h
            total = total + of_space[stream].float() / passes
        assert isinstance(total, Tensor)
        unit: NDArray[np.float32] = torch.nn.functional.normalize(total, dim=1).cpu().numpy()
        return unit

    def _heard(self, audio: Iterable[Mapping[str, Any]]) -> Tensor:
        """Normalised fbanks [B, T, M]. Raises: TrainingError for another sample rate."""
        fbanks = []
        for clip in audio:
            if clip["sampling_rate"] != self.spec.sample_rate_hz:
                raise TrainingError(
                    f"{self.name}: sound at {clip['sampling_rate']} Hz; its features are made of "
                    f"{self.spec.sample_rate_hz} Hz"
                )
            most = round(self.spec.duration_s * self.spec.sample_rate_hz)
            wave = np.asarray(clip["array"], np.float32).reshape(-1)[:most]
            # One row of an fbank takes 25 ms.
            wave = np.pad(wave, (0, max(0, self.spec.sample_rate_hz // 40 + 1 - len(wave))))
            payload, _ = fbank_payload(self._fbank(wave), self.spec)
            fbanks.append(np.array(fbank_array(payload, self.spec)))
        fbank_BTM = torch.from_numpy(np.stack(fbanks)).to(self.device)
        return normalise_fbank(fbank_BTM, self.data)

    def _seen(self, videos: Iterable[Any]) -> Tensor:
        """uint8 [B, F, H, W, 3] as a store would hold them, from RGB [F, 3, H, W]."""
        clips = []
        for video in videos:
            frames = [np.ascontiguousarray(frame) for frame in np.moveaxis(np.asarray(video), 1, 3)]
            # A clip of fewer frames than the run's shows some of them twice.
            chosen = np.arange(self.spec.n_frames) * len(frames) // self.spec.n_frames
            squares = [self._square(frames[k]) for k in chosen]
            clips.append(decode_jpegs([encode_jpeg(x, self.spec.jpeg_quality) for x in squares]))
        return torch.from_numpy(np.stack(clips)).to(self.device)

    def _square(self, frame_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        shown = av.VideoFrame.from_ndarray(frame_HW3, format="rgb24")
        return np.ascontiguousarray(to_square(shown, self._scale, 1.0, self.spec))

    def _collator(self) -> Collate:
        from mteb.models.modality_collators import VideoCollator

        collate: Collate = VideoCollator(
            target_sampling_rate=self.spec.sample_rate_hz,
            num_frames=self.spec.n_frames,
            max_samples=round(self.spec.duration_s * self.spec.sample_rate_hz),
        )
        return collate

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines [N, M]."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines [N] of rows that belong together."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(-1)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb writes into its results."""
        from mteb.models import ModelMeta

        return ModelMeta.create_empty(
            {
                "name": f"diccae/{self.name}",
                "revision": self.revision,
                "modalities": ["audio", "video"],
                "framework": ["PyTorch"],
                "n_parameters": sum(p.numel() for p in self.encoder.parameters()),
                "reference": f"diccae {__version__}",
            }
        )


def _unit(x: Any) -> Tensor:
    vectors = torch.as_tensor(x, dtype=torch.float32)
    return torch.nn.functional.normalize(torch.atleast_2d(vectors), dim=-1)
