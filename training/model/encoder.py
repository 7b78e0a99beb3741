"""Encoder: the audio-visual trunk of two branches and a joint block, and its class heads.

Pure modules: knows nothing of losses, labels, files or devices beyond the tensors it is given.
Invariant: with patch stems and one frame it computes exactly CAV-MAE's features; attribute names
are CAV-MAE's keys; what `train_only` leaves trainable gets a gradient, so plain DDP works.

Shapes: B clips, T fbank frames, M mel bins, F frames of a clip, C = 3 colours, H and W pixels,
L tokens, D token width, P projection width. Streams: audio, video, fusion (both together).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import STREAMS, EncoderConfig
from training.model.blocks import (
    Block,
    Cells,
    PatchStem,
    frame_positions,
    full_precision,
    initialise_linears,
    sincos_2d,
)
from training.model.reconstruction import (
    Decoder,
    Masking,
    masking_from_noise,
    reconstruction_loss,
    take_tokens,
)
from training.model.stems import AudioConvStem, VideoConvStem

Stem = PatchStem | AudioConvStem | VideoConvStem


class InputShape(NamedTuple):
    """Size of one clip's features."""

    fbank_frames: int
    n_mels: int
    frame_size: int
    """Height and width of a frame, pixels."""


class MaskNoise(NamedTuple):
    """What decides which tokens a masked pass hides; drawn by the caller, so it can be replayed."""

    audio_BL: Tensor
    """[B, audio tokens], any real numbers without ties."""
    video_BL: Tensor
    """[B, F * tokens of a frame]."""
    mask_ratio: float
    """Share of the tokens hidden in each modality."""


class Encoding(NamedTuple):
    """What a pass gives, for the streams it was asked for."""

    z: dict[str, Tensor]
    """[B, D], mean over tokens, at least float32."""
    h: dict[str, Tensor]
    """[B, P], unit norm, at least float32."""
    reconstruction: dict[str, Tensor]
    """Scalar mean squared error for audio and video; empty unless asked for."""


class ClassHead(nn.Module):
    """g_s of docs/method.md: LayerNorm, D -> D, GELU, D -> P, unit norm; never in bf16."""

    def __init__(self, dim: int, projection: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, projection)
        initialise_linears(self)

    def forward(self, z_BD: Tensor) -> Tensor:
        """[B, D] -> [B, P] of unit norm."""
        with torch.autocast(z_BD.device.type, enabled=False):
            return F.normalize(self.fc2(F.gelu(self.fc1(self.norm(z_BD)))), dim=-1)


class Encoder(nn.Module):
    """CAV-MAE's trunk with class heads (docs/design.md, "The encoder").

    Args: decoder: build the reconstruction decoder.
    Raises: ValueError where config and input shape do not go together.
    """

    def __init__(self, config: EncoderConfig, shape: InputShape, decoder: bool = False) -> None:
        super().__init__()
        self.config, self.shape = config, InputShape(*shape)
        dim = config.dim
        self.patch_embed_a, self.patch_embed_v = _stems(config, self.shape)
        self.pos_embed_a = _positions(self.patch_embed_a, dim)
        self.pos_embed_v = _positions(self.patch_embed_v, dim)
        self.modality_a = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.modality_v = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.blocks_a = _blocks(config, config.depth, ("fusion",))
        self.blocks_v = _blocks(config, config.depth, ("fusion",))
        self.blocks_u = _blocks(config, config.joint_depth, STREAMS)
        self.norm_a, self.norm_v, self.norm = (nn.LayerNorm(dim) for _ in range(3))
        self.class_heads = nn.ModuleDict(
            {stream: ClassHead(dim, config.projection) for stream in STREAMS}
        )
        cells = (self.patch_embed_a.cells, self.patch_embed_v.cells)
        self.decoder = Decoder(config, *cells) if decoder else None
        self.train_only(STREAMS)

    def forward(
        self,
        fbank_BTM: Tensor | None,
        frames_BFCHW: Tensor | None,
        streams: Sequence[str] = STREAMS,
        masks: MaskNoise | None = None,
        reconstruct: bool = False,
    ) -> Encoding:
        """Encode clips; a modality that no stream asks for may be None.

        Args: fbank_BTM, frames_BFCHW: normalised floats. masks: hide tokens before the branches.
            reconstruct: also predict what was hidden (needs `masks`, the fusion stream's inputs
            and a decoder).
        """
        if reconstruct and (masks is None or self.decoder is None):
            raise ValueError("reconstruction needs masks and an Encoder built with decoder=True")
        # in the order of STREAMS, never of a set: the order of sums decides the bits of gradients
        needed = [s for s in STREAMS if s in streams or (reconstruct and s == "fusion")]
        hide_a = hide_v = None
        if masks is not None:
            hide_a = masking_from_noise(masks.audio_BL, masks.mask_ratio)
            hide_v = masking_from_noise(masks.video_BL, masks.mask_ratio)
        tokens: dict[str, Tensor] = {}
        if "audio" in needed or "fusion" in needed:
            tokens["audio"] = self.audio_tokens(fbank_BTM, hide_a)
        if "video" in needed or "fusion" in needed:
            tokens["video"] = self.video_tokens(frames_BFCHW, hide_v)
        joined: dict[str, Tensor] = {s: self.join(of_stream(tokens, s), s) for s in needed}
        encoding = self._pool(joined, streams)
        if not reconstruct:
            return encoding
        errors = self._reconstruct(joined["fusion"], fbank_BTM, frames_BFCHW, hide_a, hide_v)
        return encoding._replace(reconstruction=errors)

    def encode(self, tokens: Mapping[str, Tensor], streams: Sequence[str] = STREAMS) -> Encoding:
        """`forward` from the branches' tokens on: spares the audio branch on a clip's next frame.

        Args: tokens: `audio_tokens` under audio, `video_tokens` under video, as streams need them.
        """
        joined = {stream: self.join(of_stream(tokens, stream), stream) for stream in streams}
        return self._pool(joined, streams)

    def token_counts(self, n_frames: int = 1) -> tuple[int, int]:
        """Tokens of a clip's audio and of its frames: the widths of a `MaskNoise`."""
        return self.patch_embed_a.n_tokens, n_frames * self.patch_embed_v.n_tokens

    def audio_tokens(self, fbank_BTM: Tensor | None, masking: Masking | None = None) -> Tensor:
        """Through the audio branch: [B, T, M] -> [B, L, D]."""
        expected = (self.shape.fbank_frames, self.shape.n_mels)
        if fbank_BTM is None or fbank_BTM.ndim != 3 or fbank_BTM.shape[1:] != expected:
            raise ValueError(_misfit("fbank", fbank_BTM, ("B", *expected)))
        place_1LD = self.pos_embed_a + self.modality_a
        return _through(self.blocks_a, _embed(self.patch_embed_a, fbank_BTM, place_1LD, masking))

    def video_tokens(self, frames_BFCHW: Tensor | None, masking: Masking | None = None) -> Tensor:
        """Through the video branch: [B, F, 3, H, W] -> [B, F * L, D]; attention spans frames."""
        expected = (3, self.shape.frame_size, self.shape.frame_size)
        if frames_BFCHW is None or frames_BFCHW.ndim != 5 or frames_BFCHW.shape[2:] != expected:
            raise ValueError(_misfit("frames", frames_BFCHW, ("B", "F", *expected)))
        place_FLD = self.pos_embed_v + frame_positions(frames_BFCHW.shape[1], self.pos_embed_v)
        place_1LD = place_FLD.flatten(0, 1)[None] + self.modality_v
        return _through(self.blocks_v, _embed(self.patch_embed_v, frames_BFCHW, place_1LD, masking))

    def join(self, tokens_BLD: Tensor, stream: str) -> Tensor:
        """Through the joint block with the norms of `stream`, and that stream's last norm."""
        norm = {"audio": self.norm_a, "video": self.norm_v, "fusion": self.norm}[stream]
        joined: Tensor = norm(_through(self.blocks_u, tokens_BLD, stream))
        return joined

    def train_only(
        self, streams: Sequence[str], class_heads: bool = True, positions: bool = False
    ) -> None:
        """Freeze what the given streams do not use: every trainable weight then has a gradient.

        Args: class_heads: whether a loss reads h. positions: also train the sine-cosine positions
            of patch stems (CAV-MAE: in fine-tuning only); those of conv stems always train.
        """
        self.requires_grad_(False)
        positions = positions or self.config.stem == "conv"
        for stream, sides in (("audio", "a"), ("video", "v"), ("fusion", "av")):
            if stream not in streams:
                continue
            used = [module for block in self._joint() for module in block.used_by(stream)]
            used.append({"a": self.norm_a, "v": self.norm_v, "av": self.norm}[sides])
            if class_heads:
                used.append(self.class_heads[stream])
            for side in sides:
                used += [getattr(self, f"patch_embed_{side}"), getattr(self, f"blocks_{side}")]
                getattr(self, f"modality_{side}").requires_grad_(True)
                getattr(self, f"pos_embed_{side}").requires_grad_(positions)
            for module in used:
                module.requires_grad_(True)
        if self.decoder is not None:
            self.decoder.train_weights()

    def compile_blocks(self) -> None:
        """torch.compile each transformer block in place (same weights, same keys)."""
        # A block has a variant for each stream, shape (masked, micro-batch, last chunk) and grad
        # mode: more than the 8 after which torch runs it uncompiled, with a warning nobody reads.
        torch.compiler.config.recompile_limit = 128
        for module in self.modules():
            if isinstance(module, Block):
                # All blocks share one code: after the audio's length the video's would make every
                # later graph one of any length, which is slower than those of the few there are.
                module.compile(dynamic=False)

    def _pool(self, joined: Mapping[str, Tensor], streams: Sequence[str]) -> Encoding:
        z = {stream: full_precision(joined[stream]).mean(1) for stream in streams}
        return Encoding(z, {stream: self.class_heads[stream](z[stream]) for stream in streams}, {})

    def _joint(self) -> list[Block]:
        return [block for block in self.blocks_u if isinstance(block, Block)]

    def _reconstruct(
        self,
        x_BND: Tensor,
        fbank_BTM: Tensor | None,
        frames_BFCHW: Tensor | None,
        hide_a: Masking | None,
        hide_v: Masking | None,
    ) -> dict[str, Tensor]:
        assert self.decoder is not None and hide_a is not None and hide_v is not None  # noqa: PT018
        assert fbank_BTM is not None and frames_BFCHW is not None  # noqa: PT018
        cells_a = _cut(self.patch_embed_a.cells, fbank_BTM)
        cells_v = _cut(self.patch_embed_v.cells, frames_BFCHW)
        audio, video = self.decoder(x_BND, hide_a, hide_v, n_frames=frames_BFCHW.shape[1])
        return {
            "audio": reconstruction_loss(audio, cells_a, hide_a.hidden, channels=1),
            "video": reconstruction_loss(video, cells_v, hide_v.hidden, channels=3),
        }


def of_stream(tokens: Mapping[str, Tensor], stream: str) -> Tensor:
    """Tokens a stream reads: those of its modality, for fusion audio then video."""
    if stream == "fusion":
        return torch.cat([tokens["audio"], tokens["video"]], dim=1)
    return tokens[stream]


def _cut(cells: Cells, x: Tensor) -> Tensor:
    """Flat cells of each clip: [B, tokens, values]; mel bins are the rows of a fbank."""
    if x.ndim == 3:
        return cells.cut(x.transpose(1, 2).unsqueeze(1))
    by_frame = cells.cut(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return torch.flatten(by_frame, 1, 2)


def _only_kept(cells: Cells, x: Tensor, masking: Masking) -> Tensor:
    """Clips with zeros, the mean of normalised input, in every hidden cell.

    A convolution sees beyond its token's cell; like this nothing hidden is in what is kept
    (masked convolution, ConvMAE, Gao et al. 2022, arXiv 2205.03892).
    """
    n_tokens = masking.keep.shape[1] + masking.hidden.shape[1]
    kept_BL = x.new_zeros(len(x), n_tokens).scatter(1, masking.keep, 1)
    if x.ndim == 3:
        return cells.only(x.transpose(1, 2).unsqueeze(1), kept_BL).squeeze(1).transpose(1, 2)
    by_frame = kept_BL.unflatten(1, (x.shape[1], -1)).flatten(0, 1)
    frames_BFCHW: Tensor = cells.only(x.flatten(0, 1), by_frame).unflatten(0, x.shape[:2])
    return frames_BFCHW


def _embed(stem: Stem, x: Tensor, place_1LD: Tensor, masking: Masking | None) -> Tensor:
    """Tokens of each clip with their place added; what is hidden is never embedded."""
    if masking is not None:
        found, expected = masking.keep.shape[1] + masking.hidden.shape[1], place_1LD.shape[1]
        if found != expected:
            raise ValueError(f"masks: noise for {found} tokens, there are {expected}")
        if not isinstance(stem, PatchStem):
            x = _only_kept(stem.cells, x, masking)
    if isinstance(stem, PatchStem):
        features = _cut(stem.cells, x)
    elif x.ndim == 3:
        features = stem(x)
    else:
        features = stem(x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(1, 2)
    if masking is not None:
        features = take_tokens(features, masking.keep)
        place_1LD = take_tokens(place_1LD, masking.keep)
    return (stem(features) if isinstance(stem, PatchStem) else features) + place_1LD


def _through(blocks: nn.ModuleList, x_BLD: Tensor, stream: str = "fusion") -> Tensor:
    for block in blocks:
        x_BLD = block(x_BLD, stream)
    return x_BLD


def _stems(config: EncoderConfig, shape: InputShape) -> tuple[Stem, Stem]:
    if config.stem == "conv":
        return (
            AudioConvStem(config.dim, shape.n_mels, shape.fbank_frames, config.norm),
            VideoConvStem(config.dim, shape.frame_size, config.norm),
        )
    return (
        PatchStem(config.dim, 1, shape.n_mels, shape.fbank_frames),
        PatchStem(config.dim, 3, shape.frame_size, shape.frame_size),
    )


def _positions(stem: Stem, dim: int) -> nn.Parameter:
    """Fixed sine-cosine of the patch grid, or small random values to learn."""
    if isinstance(stem, PatchStem):
        return nn.Parameter(sincos_2d(dim, *stem.cells.grid)[None], requires_grad=False)
    return nn.Parameter(torch.randn(1, stem.n_tokens, dim) * 0.02)


def _blocks(config: EncoderConfig, depth: int, streams: Sequence[str]) -> nn.ModuleList:
    blocks = nn.ModuleList(
        Block(config.dim, config.n_heads, config.mlp_ratio, streams) for _ in range(depth)
    )
    initialise_linears(blocks)
    return blocks


def _misfit(name: str, found: Tensor | None, expected: Sequence[object]) -> str:
    shape = None if found is None else list(found.shape)
    wanted = ", ".join(map(str, expected))
    return f"{name}: found shape {shape}, this encoder takes [{wanted}]"
