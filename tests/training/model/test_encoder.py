"""The encoder by itself: against a literal definition, stream by stream, mask by mask."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from training.config import STREAMS, EncoderConfig
from training.model.blocks import PATCH, Block, sincos_2d
from training.model.encoder import Encoder, InputShape, MaskNoise
from training.model.reconstruction import masking_from_noise
from training.model.stems import AudioConvStem

_PATCH = EncoderConfig(
    preset="base",
    dim=32,
    depth=2,
    joint_depth=2,
    n_heads=4,
    projection=16,
    decoder_dim=16,
    decoder_depth=2,
    decoder_heads=2,
)
_CONV = EncoderConfig(preset="tiny", dim=32, projection=16)
_SHAPE = InputShape(fbank_frames=64, n_mels=32, frame_size=48)


def _perturbed(config: EncoderConfig, **options) -> Encoder:
    """Float64, with norms and biases away from their trivial initial values."""
    torch.manual_seed(0)
    encoder = Encoder(config, _SHAPE, **options).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def _clips(n_clips: int = 3, n_frames: int = 1, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fbank = torch.randn(n_clips, 64, 32, generator=generator, dtype=torch.float64)
    frames = torch.randn(n_clips, n_frames, 3, 48, 48, generator=generator, dtype=torch.float64)
    return fbank, frames


def _noise(encoder: Encoder, n_clips: int = 3, n_frames: int = 1) -> MaskNoise:
    generator = torch.Generator().manual_seed(2)
    audio, video = encoder.token_counts(n_frames)
    noise = [torch.rand(n_clips, n_tokens, generator=generator) for n_tokens in (audio, video)]
    return MaskNoise(*noise, mask_ratio=0.5)


def _literal_norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _literal_block(state, name, x, suffix, n_heads):
    def linear(layer, y):
        return y @ state[f"{name}.{layer}.weight"].T + state[f"{name}.{layer}.bias"]

    q, k, v = linear("attn.qkv", _literal_norm(state, f"{name}.norm1{suffix}", x)).chunk(3, -1)
    width = q.shape[-1] // n_heads
    heads = []
    for head in range(n_heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v[..., part])
    x = x + linear("attn.proj", torch.cat(heads, -1))
    hidden = linear("mlp.fc1", _literal_norm(state, f"{name}.norm2{suffix}", x))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear("mlp.fc2", hidden)


def _literal_z(encoder, fbank, frames):
    """CAV-MAE written down: convolutions, explicit softmax, one stream after the other."""
    state, config = encoder.state_dict(), encoder.config
    pictures = {"a": fbank.transpose(1, 2)[:, None], "v": frames[:, 0]}
    tokens = {}
    for side, picture in pictures.items():
        weight, bias = (state[f"patch_embed_{side}.proj.{part}"] for part in ("weight", "bias"))
        x = F.conv2d(picture, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
        x = x + state[f"pos_embed_{side}"] + state[f"modality_{side}"]
        for i in range(config.depth):
            x = _literal_block(state, f"blocks_{side}.{i}", x, "", config.n_heads)
        tokens[side] = x
    z = {}
    inputs = {
        "audio": (tokens["a"], "_a"),
        "video": (tokens["v"], "_v"),
        "fusion": (torch.cat([tokens["a"], tokens["v"]], 1), ""),
    }
    for stream, (x, suffix) in inputs.items():
        for i in range(config.joint_depth):
            x = _literal_block(state, f"blocks_u.{i}", x, suffix, config.n_heads)
        z[stream] = _literal_norm(state, f"norm{suffix}", x).mean(1)
    return z


def test_streams_equal_their_literal_definition():
    encoder = _perturbed(_PATCH)
    clips = _clips()
    with torch.no_grad():
        encoding = encoder(*clips)
        expected = _literal_z(encoder, *clips)
    for stream in STREAMS:
        torch.testing.assert_close(encoding.z[stream], expected[stream], atol=1e-10, rtol=0)


def _literal_reconstruction(encoder, fbank, frames, noise):
    """Both losses by restoring the order of tokens and masking the error, clip by clip."""
    state, config = encoder.state_dict(), encoder.config
    rows = {"a": 2, "v": 3}
    kept, order = {}, {}
    for side, picture, values in (
        ("a", fbank.transpose(1, 2)[:, None], noise.audio_BL),
        ("v", frames[:, 0], noise.video_BL),
    ):
        weight, bias = (state[f"patch_embed_{side}.proj.{part}"] for part in ("weight", "bias"))
        x = F.conv2d(picture, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
        x = x + state[f"pos_embed_{side}"] + state[f"modality_{side}"]
        order[side] = values.sort(1).indices
        n_keep = int(x.shape[1] * (1 - noise.mask_ratio))
        x = torch.stack([row[index[:n_keep]] for row, index in zip(x, order[side], strict=True)])
        for i in range(config.depth):
            x = _literal_block(state, f"blocks_{side}.{i}", x, "", config.n_heads)
        kept[side] = x
    x = torch.cat([kept["a"], kept["v"]], 1)
    for i in range(config.joint_depth):
        x = _literal_block(state, f"blocks_u.{i}", x, "", config.n_heads)
    x = _literal_norm(state, "norm", x)
    x = x @ state["decoder.embed.weight"].T + state["decoder.embed.bias"]
    parts = x.split([kept["a"].shape[1], kept["v"].shape[1]], 1)
    full = []
    for side, part in zip("av", parts, strict=True):
        n_tokens = order[side].shape[1]
        whole = state["decoder.mask_token"].expand(len(x), n_tokens, -1).clone()
        for clip in range(len(x)):
            for place in range(part.shape[1]):
                whole[clip, order[side][clip, place]] = part[clip, place]
        whole = whole + state[f"decoder.pos_embed_{side}"] + state[f"decoder.modality_{side}"]
        full.append(whole)
    x = torch.cat(full, 1)
    for i in range(config.decoder_depth):
        x = _literal_block(state, f"decoder.blocks.{i}", x, "", config.decoder_heads)
    x = _literal_norm(state, "decoder.norm", x)
    n_audio = order["a"].shape[1]
    losses = []
    for side, tokens, picture in (
        ("a", x[:, :n_audio], fbank.transpose(1, 2)[:, None]),
        ("v", x[:, n_audio:], frames[:, 0]),
    ):
        weight, bias = (state[f"decoder.pred_{side}.{part}"] for part in ("weight", "bias"))
        prediction = tokens @ weight.T + bias
        errors = []
        for clip in range(len(x)):
            n_keep = int(order[side].shape[1] * (1 - noise.mask_ratio))
            for place in order[side][clip, n_keep:].tolist():
                row, column = divmod(place, picture.shape[3] // PATCH)
                assert row < rows[side]
                patch = picture[clip, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
                target = patch.permute(1, 2, 0).flatten()
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                errors.append(((prediction[clip, place] - target) ** 2).mean())
        losses.append(torch.stack(errors).mean())
    return losses


def test_masked_reconstruction_equals_its_literal_definition():
    encoder = _perturbed(_PATCH, decoder=True)
    clips, noise = _clips(), _noise(encoder)
    with torch.no_grad():
        errors = encoder(*clips, STREAMS, noise, reconstruct=True).reconstruction
        expected = _literal_reconstruction(encoder, *clips, noise)
    torch.testing.assert_close(list(errors.values()), expected, atol=1e-10, rtol=0)


def _hidden_cells(encoder, fbank, frames, noise):
    """What a conv stem's decoder should say: each hidden cell, cut by hand, mean 0, variance 1."""
    found = []
    for name, values in (("audio", noise.audio_BL), ("video", noise.video_BL)):
        order = values.sort(dim=1).indices
        n_kept = int(order.shape[1] * (1 - noise.mask_ratio))
        cells = []
        for clip in range(len(fbank)):
            for place in order[clip, n_kept:].tolist():
                if name == "audio":
                    cell = fbank[clip, place * 16 : place * 16 + 16].T[..., None]
                else:
                    frame, rest = divmod(place, 4)
                    rows, columns = (slice(32 * i, 32 * i + 32) for i in divmod(rest, 2))
                    whole = torch.zeros(3, 64, 64, dtype=frames.dtype)  # 48 pixels fill 1.5 cells
                    whole[:, :48, :48] = frames[clip, frame]
                    cell = whole[:, rows, columns].permute(1, 2, 0)
                cells.append((cell - cell.mean()) / (cell.var() + 1e-6).sqrt())
        found.append(torch.stack([cell.flatten() for cell in cells]).unflatten(0, (len(fbank), -1)))
    return found


def test_a_conv_stems_decoder_is_asked_for_the_pixels_of_hidden_cells():
    encoder = _perturbed(_CONV, decoder=True)
    clips, noise = _clips(n_frames=2), _noise(encoder, n_frames=2)
    expected = _hidden_cells(encoder, *clips, noise)
    assert encoder(*clips, STREAMS, noise, reconstruct=True).reconstruction["video"] > 0.5
    encoder.decoder.forward = lambda *_, **__: expected
    errors = encoder(*clips, STREAMS, noise, reconstruct=True).reconstruction
    assert max(errors.values()) < 1e-20


@pytest.mark.parametrize("norm", ["group", "weights"])
def test_nothing_of_a_hidden_cell_is_in_what_a_conv_stem_keeps(norm):
    encoder = _perturbed(_CONV.model_copy(update={"norm": norm}), decoder=True)
    (fbank, frames), noise = _clips(n_frames=2), _noise(encoder, n_frames=2)
    with torch.no_grad():
        kept = encoder(fbank, frames, masks=noise).z
        hidden = masking_from_noise(noise.audio_BL, noise.mask_ratio).hidden
        for clip in range(len(fbank)):
            for place in hidden[clip].tolist():
                fbank[clip, place * 16 : place * 16 + 16] += 5
        same = encoder(fbank, frames, masks=noise).z
        hidden = masking_from_noise(noise.video_BL, noise.mask_ratio).hidden
        for clip in range(len(frames)):
            for place in hidden[clip].tolist():
                frame, rest = divmod(place, 4)
                rows, columns = (slice(32 * i, 32 * i + 32) for i in divmod(rest, 2))
                frames[clip, frame, :, rows, columns] += 5
        still = encoder(fbank, frames, masks=noise).z
        assert not torch.equal(encoder(fbank, frames).z["audio"], kept["audio"])
    for stream in STREAMS:
        assert torch.equal(same[stream], kept[stream])
        assert torch.equal(still[stream], kept[stream])


@pytest.mark.parametrize("config", [_PATCH, _CONV], ids=["patch", "conv"])
@pytest.mark.parametrize("stream", STREAMS)
def test_one_stream_alone_equals_that_stream_among_all(config, stream):
    encoder = _perturbed(config)
    fbank, frames = _clips()
    with torch.no_grad():
        together = encoder(fbank, frames)
        alone = encoder(
            None if stream == "video" else fbank, None if stream == "audio" else frames, (stream,)
        )
    assert list(alone.z) == [stream]
    torch.testing.assert_close(alone.h[stream], together.h[stream], atol=1e-12, rtol=0)
    norms = alone.h[stream].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("config", [_PATCH, _CONV], ids=["patch", "conv"])
def test_audio_tokens_serve_every_frame_of_a_clip(config):
    encoder = _perturbed(config)
    fbank, frames = _clips(n_frames=2)
    with torch.no_grad():
        audio = encoder.audio_tokens(fbank)
        for i in range(2):
            tokens = {"audio": audio, "video": encoder.video_tokens(frames[:, i : i + 1])}
            expected = encoder(fbank, frames[:, i : i + 1])
            torch.testing.assert_close(encoder.encode(tokens).h, expected.h, atol=0, rtol=0)


@pytest.mark.parametrize("config", [_PATCH, _CONV], ids=["patch", "conv"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_clip_does_not_depend_on_its_neighbours(config, masked):
    encoder = _perturbed(config)
    fbank, frames = _clips(n_frames=2)
    noise = _noise(encoder, n_frames=2) if masked else None
    part = noise and MaskNoise(noise.audio_BL[:1], noise.video_BL[:1], 0.5)
    with torch.no_grad():
        whole = encoder(fbank, frames, masks=noise).z["fusion"][:1]
        chunk = encoder(fbank[:1], frames[:1], masks=part).z["fusion"]
    torch.testing.assert_close(chunk, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("config", [_PATCH, _CONV], ids=["patch", "conv"])
def test_order_of_frames_matters_and_the_first_frame_is_as_if_alone(config):
    encoder = _perturbed(config)
    fbank, frames = _clips(n_frames=3)
    with torch.no_grad():
        forwards = encoder(fbank, frames).z["video"]
        backwards = encoder(fbank, frames.flip(1)).z["video"]
    assert (forwards - backwards).abs().max() > 1e-3
    assert encoder.video_tokens(frames).shape[1] == 3 * encoder.patch_embed_v.n_tokens


def test_hidden_content_does_not_reach_the_encoding():
    encoder = _perturbed(_PATCH)
    fbank, frames = _clips()
    noise = _noise(encoder)
    changed = fbank.clone()
    hidden = noise.audio_BL.argsort(1)[0, 4:].tolist()
    for place in hidden:
        row, column = divmod(place, 4)
        changed[0, column * 16 : column * 16 + 16, row * 16 : row * 16 + 16] += 5
    with torch.no_grad():
        one = encoder(fbank, frames, masks=noise).z["fusion"]
        other = encoder(changed, frames, masks=noise).z["fusion"]
        seen = encoder(changed, frames).z["fusion"] - encoder(fbank, frames).z["fusion"]
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert seen.abs().max() > 1e-3


@pytest.mark.parametrize("config", [_PATCH, _CONV], ids=["patch", "conv"])
@pytest.mark.parametrize("streams", [STREAMS, ("audio",), ("video",), ("fusion",)])
@pytest.mark.parametrize("heads", [True, False])
def test_every_trainable_weight_has_a_gradient(config, streams, heads):
    encoder = _perturbed(config)
    encoder.train_only(streams, class_heads=heads, positions=True)
    encoding = encoder(*_clips(), streams)
    read = encoding.h if heads else encoding.z
    sum((x * torch.randn_like(x)).sum() for x in read.values()).backward()
    idle = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    frozen = [
        n for n, p in encoder.named_parameters() if not p.requires_grad and p.grad is not None
    ]
    assert (idle, frozen) == ([], [])


@pytest.mark.parametrize("config", [_PATCH, _CONV], ids=["patch", "conv"])
def test_reconstruction_gives_every_decoder_weight_a_gradient_but_no_position(config):
    encoder = _perturbed(config, decoder=True)
    encoder.train_only(STREAMS, class_heads=False)
    encoding = encoder(*_clips(), STREAMS, _noise(encoder), reconstruct=True)
    (sum(encoding.reconstruction.values()) + sum(z.sum() for z in encoding.z.values())).backward()
    idle = {n for n, p in encoder.named_parameters() if p.grad is None}
    fixed = {f"decoder.pos_embed_{side}" for side in "av"}
    if config.stem == "patch":
        fixed |= {f"pos_embed_{side}" for side in "av"}
    assert {n for n in idle if "class_heads" not in n} == fixed


def test_positions_tell_the_column_then_the_row():
    table = sincos_2d(8, 2, 3)
    assert table.shape == (6, 8)
    angle = 2.0 / 10000 ** (1 / 2)  # column 2, second frequency of two
    assert table[2].tolist() == pytest.approx(
        [math.sin(2), math.sin(angle), math.cos(2), math.cos(angle), 0, 0, 1, 1]
    )


@pytest.mark.parametrize("config", [_PATCH, _CONV], ids=["patch", "conv"])
def test_bf16_stays_near_fp32_and_keeps_heads_in_fp32(config):
    encoder = _perturbed(config).float()
    fbank, frames = (x.float() for x in _clips())
    with torch.no_grad():
        exact = encoder(fbank, frames)
        with torch.autocast("cpu", torch.bfloat16):
            rough = encoder(fbank, frames)
    assert {x.dtype for x in (*rough.z.values(), *rough.h.values())} == {torch.float32}
    for stream in STREAMS:
        assert (rough.h[stream] * exact.h[stream]).sum(1).min() > 0.999


@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    encoder = _perturbed(_PATCH)
    with torch.no_grad():
        plain = encoder(*_clips()).z["fusion"]
        encoder.compile_blocks()
        compiled = encoder(*_clips()).z["fusion"]
    torch.testing.assert_close(compiled, plain, atol=1e-10, rtol=0)


def test_inputs_of_another_shape_are_refused_by_name():
    encoder = Encoder(_CONV, _SHAPE)
    fbank, frames = (x.float() for x in _clips())
    with pytest.raises(ValueError, match=r"fbank: found shape \[3, 63, 32\].*\[B, 64, 32\]"):
        encoder(fbank[:, 1:], frames)
    with pytest.raises(ValueError, match=r"frames: found shape None"):
        encoder(fbank, None, ("fusion",))
    with pytest.raises(ValueError, match=r"smaller than one 16 x 16 patch"):
        Encoder(_PATCH, InputShape(8, 32, 48))
    with pytest.raises(ValueError, match=r"noise for 8 tokens, there are 4"):
        encoder(fbank, frames, masks=_noise(Encoder(_PATCH, _SHAPE)))
    with pytest.raises(ValueError, match=r"needs masks"):
        Encoder(_PATCH, _SHAPE, decoder=True)(fbank, frames, reconstruct=True)


@pytest.mark.parametrize(
    ("n_tokens", "ratio", "kept"),
    [(512, 0.75, 128), (196, 0.75, 49), (10, 0.9, 1), (3, 0.9, 1), (7, 0, 7)],
)
def test_masking_keeps_the_share_it_should_and_never_nothing(n_tokens, ratio, kept):
    masking = masking_from_noise(torch.rand(2, n_tokens), ratio)
    assert masking.keep.shape == (2, kept)
    both = torch.cat(masking, 1).sort(1).values
    assert torch.equal(both, torch.arange(n_tokens).expand(2, -1))


def test_nothing_hidden_cannot_be_reconstructed():
    encoder = _perturbed(_PATCH, decoder=True)
    with pytest.raises(ValueError, match="nothing is hidden"):
        encoder(*_clips(), masks=_noise(encoder)._replace(mask_ratio=0), reconstruct=True)
    with pytest.raises(ValueError, match="mask_ratio = 1"):
        encoder(*_clips(), masks=_noise(encoder)._replace(mask_ratio=1))


@pytest.mark.slow
def test_gradients_have_the_same_bits_in_every_process():
    program = (
        "import hashlib, torch\n"
        "from training.config import EncoderConfig\n"
        "from training.model.encoder import Encoder, InputShape\n"
        "torch.manual_seed(0)\n"
        "torch.set_num_threads(1)\n"
        "e = Encoder(EncoderConfig(dim=32, projection=16), InputShape(64, 32, 48))\n"
        "h = e(torch.randn(4, 64, 32), torch.randn(4, 1, 3, 48, 48)).h\n"
        "sum(x.exp().sum() for x in h.values()).backward()\n"
        "g = torch.cat([p.grad.flatten() for p in e.parameters()])\n"
        "print(hashlib.sha256(g.numpy().tobytes()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_training_core_imports_without_ray_mlflow_decord_and_faiss():
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'ray', 'mlflow', 'decord', 'faiss', 'av'}:\n"
        "            raise ImportError(name + ' is not on this machine')\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import training.model.encoder, training.model.classifier, training.weights.files\n"
        "import training.losses.terms\n"
        "import training.losses.confusion, training.losses.gather, training.model.budget\n"
        "import training.evaluation.metrics, training.evaluation.probes\n"
        "import training.evaluation.retrieval\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_stem_in_bf16_on_a_cpu_is_finite() -> None:
    torch.manual_seed(0)
    for _ in range(60):
        # Another stem each time: where its weights lie in memory decides whether it goes wrong.
        stem = AudioConvStem(dim=32, n_mels=16, fbank_frames=32)
        with torch.autocast("cpu", torch.bfloat16):
            tokens_BLD = stem(torch.randn(32, 32, 16))
        assert tokens_BLD.dtype == torch.bfloat16, "the linear layer is not in bf16"
        assert torch.isfinite(tokens_BLD).all()


@pytest.mark.slow
def test_no_block_of_a_compiled_run_falls_back_to_running_uncompiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masked and whole passes, with and without gradients, and three sizes of a chunk; each graph
    is of one length and size."""
    compiled, graphs = torch.nn.Module.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append([x for x in inputs if isinstance(x, torch.SymInt)])
        return graph.forward

    # The guards are those of a real compilation, which would take minutes.
    monkeypatch.setattr(
        Block, "compile", lambda block, **options: compiled(block, backend=backend, **options)
    )
    torch._dynamo.reset()
    encoder = Encoder(_PATCH, _SHAPE, decoder=True).double()
    encoder.compile_blocks()
    with torch.compiler.config.patch(fail_on_recompile_limit_hit=True):
        for n_clips in (4, 3, 2):
            clips = _clips(n_clips)
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    encoder(*clips, STREAMS)
                    encoder(*clips, STREAMS, _noise(encoder, n_clips), reconstruct=True)
    torch._dynamo.reset()
    assert not any(graphs), "a graph of any length"
    assert 0 < len(graphs) <= torch.compiler.config.recompile_limit
