"""The encoder with a class head for fine-tuning: CAV-MAE's five ways to classify a clip.

Pure module: knows nothing of labels, losses or files. Invariant: without auxiliary heads the logits
of every mode are CAV-MAE's; what is trainable gets a gradient in the mode it was built for.

Shapes: B clips, T fbank frames, M mel bins, F frames, C classes, D token width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from training.blocks import full_precision, initialise_linears
from training.config import STREAMS, Stream
from training.encoder import Encoder

Mode = Literal["multimodal", "audio", "video", "missing_audio", "missing_video"]
"""`audio`, `video`: trained and used on one modality. `missing_audio`, `missing_video`: CAV-MAE's
`missingaudioonly` and `missingvideoonly`, a model trained on both that is given only the audio or
only the video: mean of the plain-norm and the modality-norm pass."""

_TRAINED_STREAMS: dict[str, Stream] = {"multimodal": "fusion", "audio": "audio", "video": "video"}


class Classifier(nn.Module):
    """Logits over classes from an encoder's pooled tokens.

    Args: mode: what it is trained for, and the default of `forward`. auxiliary: heads of their own
        for the audio and the video stream, trained beside the fusion stream (multimodal only).
    Raises: ValueError for auxiliary heads in a single-modality mode.
    """

    def __init__(
        self,
        encoder: Encoder,
        n_classes: int,
        mode: Literal["multimodal", "audio", "video"] = "multimodal",
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        if auxiliary and mode != "multimodal":
            raise ValueError(f"finetune.auxiliary > 0 needs mode multimodal, found mode {mode}")
        self.encoder, self.mode, self.n_classes = encoder, mode, n_classes
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
        stream = _TRAINED_STREAMS[self.mode]
        if not self.auxiliary_heads:
            return {stream: self.logits(fbank_BTM, frames_BFCHW, self.mode)}
        return self._by_own_heads(self._tokens(fbank_BTM, frames_BFCHW, STREAMS))

    def logits(self, fbank_BTM: Tensor | None, frames_BFCHW: Tensor | None, mode: Mode) -> Tensor:
        """Logits [B, C] of `mlp_head` in a mode; a modality it does not read may be None."""
        stream: Stream = "fusion" if mode == "multimodal" else _side(mode)
        pooled_BD = self._pooled(self._tokens(fbank_BTM, frames_BFCHW, (stream,)), mode)
        return _classify(self.mlp_head, pooled_BD)

    def stream_logits(self, fbank_BTM: Tensor, frames_BFCHW: Tensor) -> dict[Stream, Tensor]:
        """Logits [B, C] of all three streams of a multimodal model in one pass, for evaluation.

        Audio and video come from their auxiliary heads, or without them from the missing modes.
        """
        tokens = self._tokens(fbank_BTM, frames_BFCHW, STREAMS)
        if self.auxiliary_heads:
            return self._by_own_heads(tokens)
        modes: dict[Stream, Mode] = {
            "audio": "missing_audio",
            "video": "missing_video",
            "fusion": "multimodal",
        }
        return {s: _classify(self.mlp_head, self._pooled(tokens, m)) for s, m in modes.items()}

    def _tokens(
        self, fbank_BTM: Tensor | None, frames_BFCHW: Tensor | None, streams: tuple[Stream, ...]
    ) -> dict[str, Tensor]:
        tokens = {}
        if {"audio", "fusion"} & set(streams):
            tokens["audio"] = self.encoder.audio_tokens(fbank_BTM)
        if {"video", "fusion"} & set(streams):
            tokens["video"] = self.encoder.video_tokens(frames_BFCHW)
        if "fusion" in streams:
            tokens["fusion"] = torch.cat([tokens["audio"], tokens["video"]], dim=1)
        return tokens

    def _by_own_heads(self, tokens: dict[str, Tensor]) -> dict[Stream, Tensor]:
        heads: dict[Stream, nn.Module] = {"fusion": self.mlp_head}
        heads |= {side: self.auxiliary_heads[side] for side in STREAMS[:2]}
        return {s: _classify(head, self._pool(tokens[s], s)) for s, head in heads.items()}

    def _pooled(self, tokens: dict[str, Tensor], mode: Mode) -> Tensor:
        if mode == "multimodal":
            return self._pool(tokens["fusion"], "fusion")
        side = _side(mode)
        own = self._pool(tokens[side], side)
        return (self._pool(tokens[side], "fusion") + own) / 2 if mode != side else own

    def _pool(self, tokens_BLD: Tensor, norms: str) -> Tensor:
        return full_precision(self.encoder.join(tokens_BLD, norms)).mean(1)


def _side(mode: str) -> Stream:
    return "audio" if mode.endswith("audio") else "video"


def _head(dim: int, n_classes: int) -> nn.Sequential:
    head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, n_classes))
    initialise_linears(head)
    return head


def _classify(head: nn.Module, pooled_BD: Tensor) -> Tensor:
    with torch.autocast(pooled_BD.device.type, enabled=False):
        return head(pooled_BD)
