"""The encoder against CAV-MAE's recorded outputs and published sizes."""

import pytest
import torch

from training.config import STREAMS, EncoderConfig
from training.losses.terms import info_nce
from training.model.classifier import Classifier
from training.model.encoder import Encoder, InputShape, MaskNoise
from training.weights.export import cavmae_state, export_cavmae
from training.weights.files import load_weights

_MODES = {
    "multimodal": "multimodal",
    "audio": "audioonly",
    "video": "videoonly",
    "missing_audio": "missingaudioonly",
    "missing_video": "missingvideoonly",
}


@pytest.fixture
def pretrained(parity):
    encoder = Encoder(parity.config, parity.shape, decoder=True).double()
    report = load_weights(encoder, parity.pretrained)
    assert report.layout == "cavmae"
    assert all(key.startswith("class_heads.") for key in report.missing)
    assert report.unexpected == []
    return encoder


def test_features_equal_cavmae_in_float64(parity, pretrained):
    with torch.no_grad():
        audio = pretrained.join(pretrained.audio_tokens(parity.fbank_BTM), "audio")
        video = pretrained.join(pretrained.video_tokens(parity.frames_BFCHW), "video")
        z = pretrained(parity.fbank_BTM, parity.frames_BFCHW).z
    torch.testing.assert_close(audio, parity.expected["tokens_audio"], atol=1e-9, rtol=0)
    torch.testing.assert_close(video, parity.expected["tokens_video"], atol=1e-9, rtol=0)
    torch.testing.assert_close(
        z["audio"], parity.expected["tokens_audio"].mean(1), atol=1e-9, rtol=0
    )


def test_layernorm_eps_of_mae_would_fail_the_parity_check(parity, pretrained):
    for module in pretrained.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    with torch.no_grad():
        audio = pretrained.join(pretrained.audio_tokens(parity.fbank_BTM), "audio")
    assert (audio - parity.expected["tokens_audio"]).abs().max() > 1e-7


@pytest.mark.parametrize("mode", _MODES)
def test_logits_equal_cavmae_in_float64(parity, mode):
    classes = [f"class {i}" for i in range(309)]
    classifier = Classifier(Encoder(parity.config, parity.shape), 309).double()
    report = load_weights(classifier, parity.finetuned, classes, source_classes=classes)
    assert report.unexpected == []
    fbank = None if mode.endswith("video") else parity.fbank_BTM
    frames = None if mode.endswith("audio") else parity.frames_BFCHW
    with torch.no_grad():
        logits = classifier.logits(fbank, frames, mode)
    expected = parity.expected[f"logits/{_MODES[mode]}"]
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


def test_masked_pass_equals_cavmae(parity, pretrained):
    recorded = {
        name.removeprefix("masked/"): value
        for name, value in parity.expected.items()
        if name.startswith("masked/")
    }
    # ids_restore is the rank of each token's noise, so it serves as the noise itself
    noise = [recorded[f"ids_restore_{side}"].double() for side in ("audio", "video")]
    with torch.no_grad():
        encoding = pretrained(
            parity.fbank_BTM,
            parity.frames_BFCHW,
            STREAMS,
            MaskNoise(*noise, 0.75),
            reconstruct=True,
        )
    contrast = 0.01 * info_nce(encoding.z["audio"], encoding.z["video"], 0.05, "v2a", "global").loss
    loss_audio, loss_video = (encoding.reconstruction[side] for side in ("audio", "video"))
    found = {
        **encoding.z,
        "loss_audio": loss_audio,
        "loss_video": loss_video,
        "contrast": contrast,
        "loss": loss_audio + loss_video + contrast,
    }
    errors = {name: (value - recorded[name]).abs().max().item() for name, value in found.items()}
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("direction", ["v2a", "both"])
def test_contrastive_loss_of_unmasked_features_equals_cavmae(parity, direction):
    audio, video = (parity.expected[f"tokens_{side}"].mean(1) for side in ("audio", "video"))
    loss = info_nce(audio, video, 0.05, direction, "global").loss
    torch.testing.assert_close(loss, parity.expected[f"info_nce/{direction}"], atol=1e-9, rtol=0)


def test_export_gives_back_the_published_layout(parity, pretrained):
    file = torch.load(parity.pretrained, weights_only=True)
    exported = export_cavmae(pretrained)
    assert exported.keys() == file.keys()
    unread = {k for k in file if "blocks_u" not in k and k.split(".")[-2].endswith(("_a", "_v"))}
    unread = {k for k in unread if ".norm1_" in k or ".norm2_" in k}
    for key, tensor in file.items():
        if key not in unread:
            torch.testing.assert_close(exported[key].float(), tensor, atol=0, rtol=0, msg=key)
    assert len(unread) > 0


def test_export_of_a_classifier_gives_back_the_finetuning_layout(parity):
    classes = [f"class {i}" for i in range(309)]
    classifier = Classifier(Encoder(parity.config, parity.shape), 309)
    uri = parity.finetuned
    load_weights(classifier, uri, classes, source_classes=classes)
    file = torch.load(uri, weights_only=True)
    exported = export_cavmae(classifier)
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in file.items()}


def test_base_has_the_published_number_of_parameters():
    shape = InputShape(1024, 128, 224)
    with torch.device("meta"):
        pretraining = Encoder(EncoderConfig(preset="base"), shape, decoder=True)
        finetuning = Classifier(Encoder(EncoderConfig(preset="base"), shape), 309)
        exported = [_count_cavmae(model) for model in (pretraining, finetuning)]
    assert exported == [(647, 191_036), (478, 164_739)]


def _count_cavmae(model) -> tuple[int, int]:
    state = cavmae_state(model)
    return len(state), round(sum(tensor.numel() for tensor in state.values()) / 1000)
