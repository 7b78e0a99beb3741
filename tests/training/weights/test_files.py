"""Weights in and out: published layouts, our own folders, storage by URI, what is refused."""

import argparse
import functools
import http.server
import json
import random
import threading
import uuid
from pathlib import Path

import fsspec
import pytest
import torch

from training.config import EncoderConfig, FbankStatistics
from training.errors import WeightsError
from training.model.classifier import Classifier
from training.model.encoder import Encoder, InputShape
from training.weights.export import export_cavmae
from training.weights.files import (
    load_classifier,
    load_encoder,
    load_weights,
    read_class_names,
    save_classifier,
    save_encoder,
)
from training.weights.layouts import class_order, resize_positions

_CONFIG = EncoderConfig(
    preset="base",
    dim=16,
    depth=2,
    n_heads=2,
    projection=8,
    decoder_dim=8,
    decoder_depth=2,
    decoder_heads=2,
)
_SHAPE = InputShape(fbank_frames=64, n_mels=128, frame_size=32)
_CLASSES = ["dog, barking", "cat meowing", "police car (siren)"]


def _encoder(seed: int = 0, config=_CONFIG, shape=_SHAPE, decoder: bool = False) -> Encoder:
    torch.manual_seed(seed)
    encoder = Encoder(config, shape, decoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def _clips(shape=_SHAPE):
    torch.manual_seed(9)
    return (
        torch.randn(2, shape.fbank_frames, shape.n_mels),
        torch.randn(2, 1, 3, shape.frame_size, shape.frame_size),
    )


def _write(uri: str, value: object) -> str:
    with fsspec.open(uri, "wb") as file:
        torch.save(value, file)
    return uri


@pytest.fixture(params=["path", "file", "memory"])
def folder(request, tmp_path):
    name = uuid.uuid4().hex
    return {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{name}"}[
        request.param
    ]


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_cavmae_layout_round_trip_keeps_every_output(folder, prefix):
    source, target = _encoder(1, decoder=True), _encoder(2, decoder=True)
    uri = _write(f"{folder}/cavmae.pth", export_cavmae(source, prefix))
    report = load_weights(target, uri)
    assert report.layout == "cavmae"
    assert report.unexpected == report.resized == []
    assert all(key.startswith("class_heads.") for key in report.missing)
    with torch.no_grad():
        assert torch.equal(target(*_clips()).z["fusion"], source(*_clips()).z["fusion"])
        assert torch.equal(target.decoder.pred_v.weight, source.decoder.pred_v.weight)


def test_pretraining_file_without_our_decoder_reports_what_it_left(tmp_path):
    uri = _write(f"{tmp_path}/cavmae.pth", export_cavmae(_encoder(1, decoder=True)))
    report = load_weights(_encoder(2), uri)
    assert report.unexpected
    assert all(key.startswith("decoder.") for key in report.unexpected)


def _mae_file(decoder: bool) -> dict[str, torch.Tensor]:
    """timm's names, 3 blocks of width 16, as published MAE files have them."""
    torch.manual_seed(3)

    def block(name: str, dim: int) -> dict[str, tuple[int, ...]]:
        linears = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        linears |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (n_out, n_in) in linears.items():
            shapes |= {f"{name}.{layer}.weight": (n_out, n_in), f"{name}.{layer}.bias": (n_out,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{name}.{norm}.weight": (dim,), f"{name}.{norm}.bias": (dim,)}
        return shapes

    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 16),
        "pos_embed": (1, 5, 16),
        "patch_embed.proj.weight": (16, 3, 16, 16),
        "patch_embed.proj.bias": (16,),
        "norm.weight": (16,),
        "norm.bias": (16,),
    }
    for i in range(3):
        shapes |= block(f"blocks.{i}", 16)
    if decoder:
        shapes |= {"mask_token": (1, 1, 8), "decoder_pos_embed": (1, 5, 8)}
        shapes |= {"decoder_embed.weight": (8, 16), "decoder_embed.bias": (8,)}
        shapes |= {"decoder_norm.weight": (8,), "decoder_norm.bias": (8,)}
        shapes |= {"decoder_pred.weight": (768, 8), "decoder_pred.bias": (768,)}
        for i in range(2):
            shapes |= block(f"decoder_blocks.{i}", 8)
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def test_mae_weights_go_to_both_branches_as_cavmae_starts(tmp_path):
    file = _mae_file(decoder=True)
    arguments = argparse.Namespace(model="mae_vit_base_patch16")
    uri = _write(f"{tmp_path}/mae.pth", {"model": file, "args": arguments})
    encoder = _encoder(decoder=True)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    report = load_weights(encoder, uri)
    state = encoder.state_dict()
    kernel = file["patch_embed.proj.weight"]
    assert torch.equal(state["patch_embed_v.proj.weight"], kernel)
    summed = kernel[:, :1] + kernel[:, 1:2] + kernel[:, 2:]
    torch.testing.assert_close(state["patch_embed_a.proj.weight"], summed)
    for part in ("mlp.fc1.weight", "norm1.bias"):
        assert torch.equal(state[f"blocks_a.1.{part}"], file[f"blocks.1.{part}"])
        assert torch.equal(state[f"blocks_v.1.{part}"], file[f"blocks.1.{part}"])
    for suffix in ("", "_a", "_v"):
        assert torch.equal(state[f"blocks_u.0.norm2{suffix}.bias"], file["blocks.2.norm2.bias"])
        assert torch.equal(state[f"norm{suffix}.weight"], file["norm.weight"])
    assert torch.equal(state["pos_embed_v"], file["pos_embed"][:, 1:])
    assert torch.equal(state["decoder.pos_embed_v"], file["decoder_pos_embed"][:, 1:])
    assert torch.equal(state["decoder.pred_a.weight"], file["decoder_pred.weight"][:256])
    assert torch.equal(state["decoder.pred_v.bias"], file["decoder_pred.bias"])
    assert torch.equal(
        state["decoder.blocks.1.attn.proj.bias"], file["decoder_blocks.1.attn.proj.bias"]
    )
    kept = [key for key in report.missing if not key.startswith("class_heads.")]
    assert set(kept) == {"pos_embed_a", "modality_a", "modality_v"} | {
        f"decoder.{name}" for name in ("pos_embed_a", "modality_a", "modality_v")
    }
    assert all(torch.equal(state[key], before[key]) for key in kept)
    assert report.unexpected == ["cls_token"]


def test_mae_encoder_alone_is_enough(tmp_path):
    uri = _write(f"{tmp_path}/mae.pth", {"model": _mae_file(decoder=False)})
    assert load_weights(_encoder(), uri).layout == "mae"


def test_positions_follow_other_lengths_and_sizes(tmp_path):
    uri = _write(f"{tmp_path}/cavmae.pth", export_cavmae(_encoder(1, decoder=True)))
    larger = InputShape(fbank_frames=128, n_mels=128, frame_size=64)
    encoder = _encoder(2, shape=larger, decoder=True)
    report = load_weights(encoder, uri)
    assert report.resized == [f"{part}pos_embed_{s}" for s in "av" for part in ("", "decoder.")]
    with torch.no_grad():
        assert torch.isfinite(encoder(*_clips(larger)).h["fusion"]).all()


@pytest.mark.parametrize("fbank_frames", [32, 128])
def test_audio_positions_keep_their_times(tmp_path, fbank_frames):
    """A row of every fbank is 10 ms: the table was squeezed, or stretched, over other clips."""
    file = export_cavmae(Encoder(_CONFIG, _SHAPE, decoder=True))
    uri = _write(f"{tmp_path}/cavmae.pth", file)
    shape = _SHAPE._replace(fbank_frames=fbank_frames)
    encoder = Encoder(_CONFIG, shape, decoder=True)
    assert encoder.decoder is not None
    tables = (encoder.pos_embed_a, encoder.decoder.pos_embed_a)
    expected = [table.clone() for table in tables]
    for table in tables:
        table.fill_(9.0)
    assert load_weights(encoder, uri).resized == ["pos_embed_a", "decoder.pos_embed_a"]
    for table, before in zip(tables, expected, strict=True):
        torch.testing.assert_close(table, before)
    trained = {k: v.half() + 0.1 * torch.randn_like(v).half() for k, v in file.items()}
    load_weights(encoder, _write(f"{tmp_path}/trained.pth", trained))
    known = trained["module.pos_embed_a"].float().unflatten(1, (8, 4))
    taken = encoder.pos_embed_a.unflatten(1, (8, fbank_frames // 16))
    if fbank_frames == 32:
        assert torch.equal(taken, known[:, :, :2])
    else:
        assert torch.isfinite(taken).all()
        assert not torch.allclose(taken[:, :, :4], known, atol=0.05), "nothing continues it"


def test_an_encoder_of_ours_for_longer_clips_keeps_the_times_of_shorter_ones(folder):
    """Learned positions of a conv stem, by the length its card names."""
    config = EncoderConfig(preset="tiny", dim=16, n_heads=2)
    long = _encoder(1, config)
    save_encoder(long, f"{folder}/encoder")
    short = _encoder(2, config, _SHAPE._replace(fbank_frames=40))
    assert load_weights(short, f"{folder}/encoder").resized == ["pos_embed_a"]
    assert torch.equal(short.pos_embed_a, long.pos_embed_a[:, :3])


def test_fewer_mel_bins_leave_the_times_of_audio_positions(tmp_path):
    """They are the same range in fewer tokens; what tells the time is not interpolated."""
    uri = _write(f"{tmp_path}/cavmae.pth", export_cavmae(Encoder(_CONFIG, _SHAPE)))
    encoder = Encoder(_CONFIG, InputShape(fbank_frames=96, n_mels=64, frame_size=32))
    expected = encoder.pos_embed_a.clone().unflatten(1, (4, 6))
    load_weights(encoder, uri)
    taken = encoder.pos_embed_a.unflatten(1, (4, 6))
    torch.testing.assert_close(taken[..., :8], expected[..., :8])
    assert not torch.allclose(taken[..., 8:], expected[..., 8:], atol=0.05)


def test_resizing_keeps_rows_and_columns_apart():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(4.0), indexing="ij")
    table = torch.stack([rows.flatten(), columns.flatten()], 1)[None]
    resized = resize_positions(table, 8, (8, 12))[0].unflatten(0, (8, 12))
    torch.testing.assert_close(resized[..., 0], torch.arange(8.0)[:, None].expand(8, 12))
    assert (resized[:, 1:, 1] > resized[:, :-1, 1]).all()
    assert resize_positions(table, 8, (8, 4)) is table
    with pytest.raises(WeightsError, match="no grid of 7 rows"):
        resize_positions(table, 7, (8, 4))


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_saved_encoder_comes_back_whole(folder, stem):
    config = _CONFIG if stem == "patch" else EncoderConfig(preset="tiny", dim=16, n_heads=2)
    encoder = _encoder(1, config, decoder=stem == "patch")
    spec, provenance = {"n_mels": 128}, {"run_id": "r1", "store_version": 3}
    statistics = FbankStatistics(-9.0, 4.0)
    saved = (_CLASSES, spec, provenance)
    save_encoder(encoder, f"{folder}/encoder/", *saved, statistics=statistics)
    loaded, card = load_encoder(f"{folder}/encoder")
    assert (card.config, card.shape, card.classes) == (config, _SHAPE, _CLASSES)
    assert (card.feature_spec, card.provenance) == (spec, provenance)
    assert card.statistics == statistics
    with torch.no_grad():
        for stream, h in encoder(*_clips()).h.items():
            assert torch.equal(loaded(*_clips()).h[stream], h)
    other = _encoder(2, config)
    report = load_weights(other, f"{folder}/encoder")
    assert report == ("diccae", [], [], [], (statistics, spec, None))
    assert torch.equal(
        other.class_heads["audio"].fc1.weight, encoder.class_heads["audio"].fc1.weight
    )


@pytest.mark.parametrize("options", [{}, {"auxiliary": True}, {"mode": "audio"}], ids=str)
def test_saved_classifier_comes_back_whole(folder, options):
    classifier = Classifier(_encoder(1), 3, **options)
    save_classifier(classifier, folder, _CLASSES)
    loaded, card = load_classifier(folder)
    assert card.classes == _CLASSES
    with torch.no_grad():
        for stream, logits in classifier(*_clips()).items():
            assert torch.equal(loaded(*_clips())[stream], logits)


def test_imported_heads_are_reordered_by_name(folder):
    source = Classifier(_encoder(1), 3, auxiliary=True)
    save_classifier(source, folder, _CLASSES)
    order = [2, 0, 1]
    target = Classifier(_encoder(2), 3, auxiliary=True)
    report = load_weights(target, folder, classes=[_CLASSES[i] for i in order])
    assert report.unexpected == []
    with torch.no_grad():
        for stream, logits in source(*_clips()).items():
            torch.testing.assert_close(target(*_clips())[stream], logits[:, order])


def test_imported_head_without_names_is_left_alone(tmp_path):
    source, target = Classifier(_encoder(1), 3), Classifier(_encoder(2), 3)
    uri = _write(f"{tmp_path}/finetuned.pth", export_cavmae(source))
    before = target.mlp_head[1].weight.clone()
    report = load_weights(target, uri, classes=_CLASSES)
    assert torch.equal(target.mlp_head[1].weight, before)
    assert set(report.unexpected) == {f"mlp_head.{i}.{p}" for i in "01" for p in ("weight", "bias")}


def test_class_names_match_by_their_words(tmp_path):
    listed = tmp_path / "class_labels_indices_vgg.csv"
    listed.write_text(
        "index,mid,display_name\n1,vgg_1,cat meowing\n0,vgg_0,dog_ barking\n"
        '2,vgg_2,"Police car (siren)"\n'
    )
    names = read_class_names(str(listed))
    assert names == ["dog_ barking", "cat meowing", "Police car (siren)"]
    assert class_order(list(reversed(_CLASSES)), names) == [2, 1, 0]
    with pytest.raises(WeightsError, match=r"1 of 1 classes are not in the source's list.*'zebra'"):
        class_order(["zebra"], names)
    with pytest.raises(WeightsError, match="cannot be told apart"):
        class_order(["a b"], ["a_b", "a, b"])


def test_damaged_or_mixed_files_are_refused(tmp_path):
    save_encoder(_encoder(1), f"{tmp_path}/one")
    save_encoder(_encoder(2), f"{tmp_path}/two")
    (tmp_path / "one/encoder.safetensors").write_bytes(
        (tmp_path / "two/encoder.safetensors").read_bytes()
    )
    with pytest.raises(WeightsError, match="sha256 differs"):
        load_encoder(f"{tmp_path}/one")
    (tmp_path / "two/encoder.json").write_text(json.dumps({"kind": "encoder"}))
    with pytest.raises(WeightsError, match="no card of a diccae encoder"):
        load_encoder(f"{tmp_path}/two")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(WeightsError, match="no safetensors file"):
        load_weights(_encoder(), f"{tmp_path}/cut.safetensors")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


class _Payload:
    def __reduce__(self):
        return (open, ("/nonexistent/diccae-was-here", "w"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (_Payload(), "cannot be read as tensors alone"),
        ([torch.zeros(2)], "holds a list, expected a state dict"),
        ({"weight": torch.zeros(2)}, "neither CAV-MAE's"),
    ],
    ids=["code", "list", "stranger"],
)
def test_files_that_are_no_weights_are_refused(tmp_path, value, message):
    with pytest.raises(WeightsError, match=message):
        load_weights(_encoder(), _write(f"{tmp_path}/file.pth", value))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles_are_refused_however_they_break(tmp_path):
    whole = Path(_write(f"{tmp_path}/whole.pth", export_cavmae(_encoder(1)))).read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(5):
            damaged[rng.randrange(2000)] = rng.randrange(256)
        path = tmp_path / "damaged.pth"
        path.write_bytes(damaged)
        try:
            load_weights(_encoder(2), str(path))
        except WeightsError as error:
            refused += str(path) in str(error)
    assert refused > 30


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = export_cavmae(_encoder(1))
    state["module.norm_a.bias"][3] = float("nan")
    with pytest.raises(WeightsError, match=r"norm_a\.bias holds NaN"):
        load_weights(_encoder(2), _write(f"{tmp_path}/nan.pth", state))


def test_weights_come_over_http_by_a_link_with_a_query(tmp_path):
    _write(f"{tmp_path}/scale++.pth", export_cavmae(_encoder(1)))
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/scale++.pth?dl=1"
        assert load_weights(_encoder(2), uri).layout == "cavmae"
        server.shutdown()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"nowhere\.pth cannot be read: FileNotFoundError"):
        load_weights(_encoder(), f"{tmp_path}/nowhere.pth")


@pytest.mark.parametrize("change", [{"depth": 3}, {"depth": 1}, {"dim": 32}], ids=str)
def test_a_trunk_that_does_not_fit_is_refused_untouched(tmp_path, change):
    uri = _write(f"{tmp_path}/cavmae.pth", export_cavmae(_encoder(1)))
    encoder = _encoder(2, _CONFIG.model_copy(update=change))
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    with pytest.raises(WeightsError, match=r"cavmae\.pth: .*check encoder"):
        load_weights(encoder, uri)
    assert all(torch.equal(before[key], t) for key, t in encoder.state_dict().items())


def test_mae_of_another_depth_is_refused(tmp_path):
    uri = _write(f"{tmp_path}/mae.pth", {"model": _mae_file(decoder=False)})
    deeper = _encoder(config=_CONFIG.model_copy(update={"depth": 4}))
    with pytest.raises(WeightsError, match=r"3 blocks; .* is 4 \+ 1"):
        load_weights(deeper, uri)


def test_conv_stems_have_no_cavmae_layout():
    config = EncoderConfig(preset="tiny", dim=16, n_heads=2)
    with pytest.raises(WeightsError, match="no counterpart in CAV-MAE"):
        export_cavmae(_encoder(config=config))
