"""Model: an encoder and a classifier applied to decoded clips, the same for a split and for a clip.

Pure arrays in and out: knows nothing of stores, Ray or where clips come from. Invariant: no
randomness; what a clip gets does not depend on the clips beside it, but for rounding.

Shapes: N or n clips, F frames a pass sees, D token width, P projection, C classes, T fbank frames,
M mel bins.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.config import DataConfig, Stream
from training.data.augment import normalise_fbank, normalise_frames
from training.evaluate_config import Precision
from training.model.classifier import Classifier
from training.model.encoder import Encoder
from training.model.numerics import applied_precision, autocast
from training.weights.card import Space
from training.weights.files import load_classifier, load_encoder

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

    Args: precision: autocast type of the trunks, None: as `applied_precision` has it;
        probabilities are computed in fp32.
    """

    def __init__(
        self, models: Models, data: DataConfig, device: str, precision: Precision | None = None
    ) -> None:
        self.data, self.device = data, torch.device(device)
        self.precision = applied_precision(precision, self.device)
        encoder, classifier = models
        self.encoder = load_encoder(encoder)[0].to(self.device) if encoder else None
        self.classifier = load_classifier(classifier)[0].to(self.device) if classifier else None

    @torch.no_grad()
    def __call__(
        self,
        fbank_nTM: NDArray[np.float16],
        frames_nFHWC: NDArray[np.uint8],
        n_passes: int,
        classify: bool = True,
    ) -> Outputs:
        """Means over `n_passes` passes, each with its own F of the n clips' frames, as stored.

        Args: classify: whether the classifier, if there is one, is applied too.
        """
        classifier = self.classifier if classify else None
        fbank = torch.from_numpy(np.array(fbank_nTM)).to(self.device)
        fbank = normalise_fbank(fbank, self.data)
        trunks = self._trunks(classifier)
        with autocast(self.precision, self.device):
            heard = {name: {"audio": x.audio_tokens(fbank)} for name, x in trunks.items()}
            # Of the audio stream every pass would say the same again.
            of_audio = self._outputs(fbank, None, heard, ("audio",), classifier)
        sums: dict[tuple[str, str], Tensor] = {}
        for i in range(n_passes):
            frames = torch.from_numpy(np.array(frames_nFHWC[:, i::n_passes])).to(self.device)
            seen = normalise_frames(frames)
            with autocast(self.precision, self.device):
                tokens = {
                    name: heard[name] | {"video": x.video_tokens(seen)}
                    for name, x in trunks.items()
                }
                found = self._outputs(fbank, seen, tokens, ("video", "fusion"), classifier)
            # Added once a pass, as the others are: a sum of n parts has other bits than the whole.
            for key, value in (of_audio | found).items():
                sums[key] = sums.get(key, 0) + value.float() / n_passes
        kinds: dict[str, ByStream] = {kind: {} for kind in Outputs._fields}
        for (kind, stream), total in sums.items():
            kinds[kind][stream] = total.cpu().numpy()
        return Outputs(**kinds)

    def _trunks(self, classifier: Classifier | None) -> dict[str, Encoder]:
        """Encoders whose audio tokens every pass shares."""
        trunks = {} if self.encoder is None else {"encoder": self.encoder}
        if classifier is not None and classifier.mode == "multimodal":
            trunks["classifier"] = classifier.encoder
        return trunks

    def _outputs(
        self,
        fbank: Tensor,
        frames: Tensor | None,
        tokens: dict[str, dict[str, Tensor]],
        streams: tuple[Stream, ...],
        classifier: Classifier | None,
    ) -> dict[tuple[str, str], Tensor]:
        """z, h and probabilities of some streams, by kind of output and stream.

        Args: frames: of a pass; None for the audio stream. tokens: of `_trunks`, by side.
        """
        out: dict[tuple[str, str], Tensor] = {}
        if self.encoder is not None:
            z, h, _ = self.encoder.encode(tokens["encoder"], streams)
            out |= {("z", s): x for s, x in z.items()} | {("h", s): x for s, x in h.items()}
        if classifier is None:
            return out
        logits: dict[Stream, Tensor] = {}
        if "classifier" in tokens:
            logits = classifier.logits_of(tokens["classifier"], streams)
        elif classifier.mode in streams:
            logits = classifier(fbank, frames)
        return out | {("p", s): classifier.probabilities(x) for s, x in logits.items()}


def test_passes(n_stored: int, frames_per_clip: int, wanted: int | None) -> int:
    """Passes over a clip at test time: its stored frames, F at a time."""
    most = max(1, n_stored // frames_per_clip)
    return most if wanted is None else max(1, min(most, wanted // frames_per_clip))
