"""Classifier: the encoder with a class head, and CAV-MAE's five ways to classify a clip.

Pure module: knows nothing of labels, losses or files. Invariant: without auxiliary heads the logits
of every mode are CAV-MAE's; what is trainable gets a gradient in the mode it was built for.

Shapes: B clips, T fbank frames, M mel bins, F frames, C classes, D token width.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from training.config import STREAMS, Stream
from training.model.blocks import full_precision, initialise_linears
from training.model.encoder import Encoder, of_stream

Mode = Literal["multimodal", "audio", "video", "missing_audio", "missing_video"]
"""`audio`, `video`: trained and used on one modality. `missing_audio`, `missing_video`: CAV-MAE's
`missingaudioonly` and `missingvideoonly`, a model trained on both that is given only the audio or
only the video: mean of the plain-norm and the modality-norm pass."""

_EVALUATED_MODES: dict[Stream, Mode] = {
    "audio": "missing_audio",
    "video": "missing_video",
    "fusion": "multimodal",
}
_TRAINED_STREAMS: dict[str, Stream] = {"multimodal": "fusion", "audio": "audio", "video": "video"}


class Classifier(nn.Module):
    """Logits over classes from an encoder's pooled tokens.

    Args: mode: what it is trained for, and the default of `forward`. auxiliary: heads of their own
        for the audio and the video stream, trained beside the fusion stream (multimodal only).
        multi_label: a clip may be of several classes, so each has a probability of its own.
    Raises: ValueError for auxiliary heads in a single-modality mode.
    """

    def __init__(
        self,
        encoder: Encoder,
        n_classes: int,
        mode: Literal["multimodal", "audio", "video"] = "multimodal",
        auxiliary: bool = False,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        if auxiliary and mode != "multimodal":
            raise ValueError(f"finetune.auxiliary > 0 needs mode multimodal, found mode {mode}")
        self.encoder, self.mode, self.n_classes = encoder, mode, n_classes
        self.multi_label = multi_label
        self.mlp_head = _head(encoder.config.dim, n_classes)
        sides: tuple[Stream, ...] = ("audio", "video") if auxiliary else ()
        self.auxiliary_heads = nn.ModuleDict(
            {side: _head(encoder.config.dim, n_classes) for side in sides}
        )
        streams = STREAMS if auxiliary else (_TRAINED_STREAMS[mode],)
        encoder.train_only(streams, class_heads=False, positions=True)
        if encoder.decoder is not None:
            encoder.decoder.requires_grad_(False)

    def forward(
        self, fbank_BTM: Tensor | None, frames_BFCHW: Tensor | None
    ) -> dict[Stream, Tensor]:
        """Logits [B, C] that training compares with labels, by stream.

        multimodal: fusion, and audio and video with auxiliary heads; else the one stream.
        """
        if self.auxiliary_heads:
            return self.logits_of(self._tokens(fbank_BTM, frames_BFCHW, self.mode))
        return {_TRAINED_STREAMS[self.mode]: self.logits(fbank_BTM, frames_BFCHW, self.mode)}

    def logits(self, fbank_BTM: Tensor | None, frames_BFCHW: Tensor | None, mode: Mode) -> Tensor:
        """Logits [B, C] of `mlp_head` in a mode; a modality it does not read may be None."""
        return self._by_mlp_head(self._tokens(fbank_BTM, frames_BFCHW, mode), mode)

    def stream_logits(self, fbank_BTM: Tensor, frames_BFCHW: Tensor) -> dict[Stream, Tensor]:
        """Logits [B, C] of all three streams of a multimodal model in one pass, for evaluation."""
        return self.logits_of(self._tokens(fbank_BTM, frames_BFCHW, "multimodal"))

    def logits_of(
        self, tokens: Mapping[str, Tensor], streams: Sequence[Stream] = STREAMS
    ) -> dict[Stream, Tensor]:
        """`stream_logits` from the encoder's tokens on, of some streams.

        Audio and video come from their auxiliary heads, or without them from the missing modes.
        Args: tokens: `audio_tokens` under audio, `video_tokens` under video, as streams need them.
        """
        if not self.auxiliary_heads:
            return {s: self._by_mlp_head(tokens, _EVALUATED_MODES[s]) for s in streams}
        heads: dict[Stream, nn.Module] = {"fusion": self.mlp_head}
        heads |= {side: self.auxiliary_heads[side] for side in STREAMS[:2]}
        # Fusion first, as ever: the order of passes decides the bits of gradients.
        return {
            stream: _classify(head, self._pool(of_stream(tokens, stream), stream))
            for stream, head in heads.items()
            if stream in streams
        }

    def probabilities(self, logits_BC: Tensor) -> Tensor:
        """float32 [B, C]: of the one class of a clip, or of each class for itself."""
        logits_BC = logits_BC.float()
        return logits_BC.sigmoid() if self.multi_label else logits_BC.softmax(1)

    def _tokens(
        self, fbank_BTM: Tensor | None, frames_BFCHW: Tensor | None, mode: str
    ) -> dict[str, Tensor]:
        tokens = {}
        if not mode.endswith("video"):
            tokens["audio"] = self.encoder.audio_tokens(fbank_BTM)
        if not mode.endswith("audio"):
            tokens["video"] = self.encoder.video_tokens(frames_BFCHW)
        return tokens

    def _by_mlp_head(self, tokens: Mapping[str, Tensor], mode: Mode) -> Tensor:
        if mode == "multimodal":
            return _classify(self.mlp_head, self._pool(of_stream(tokens, "fusion"), "fusion"))
        side = "audio" if mode.endswith("audio") else "video"
        pooled_BD = self._pool(tokens[side], side)
        if mode != side:
            pooled_BD = (pooled_BD + self._pool(tokens[side], "fusion")) / 2
        return _classify(self.mlp_head, pooled_BD)

    def _pool(self, tokens_BLD: Tensor, norms: str) -> Tensor:
        return full_precision(self.encoder.join(tokens_BLD, norms)).mean(1)


def _head(dim: int, n_classes: int) -> nn.Sequential:
    head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, n_classes))
    initialise_linears(head)
    return head


def _classify(head: nn.Module, pooled_BD: Tensor) -> Tensor:
    with torch.autocast(pooled_BD.device.type, enabled=False):
        logits_BC: Tensor = head(pooled_BD)
    return logits_BC
