"""Five ways to classify a clip, auxiliary heads, and what each leaves trainable."""

import pytest
import torch

from training.config import STREAMS, EncoderConfig
from training.model.classifier import Classifier
from training.model.encoder import Encoder, InputShape

_SHAPE = InputShape(32, 16, 32)
_CONFIGS = {
    "conv": EncoderConfig(preset="tiny", dim=16, projection=8, n_heads=2),
    "patch": EncoderConfig(preset="base", dim=16, depth=1, n_heads=2, projection=8),
}


def _classifier(stem: str = "conv", **options) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier(Encoder(_CONFIGS[stem], _SHAPE), 5, **options).double()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return classifier


@pytest.fixture
def clips():
    generator = torch.Generator().manual_seed(1)
    fbank = torch.randn(3, 32, 16, generator=generator, dtype=torch.float64)
    return fbank, torch.randn(3, 2, 3, 32, 32, generator=generator, dtype=torch.float64)


def test_modes_equal_their_definition(clips):
    classifier = _classifier()
    encoder, head = classifier.encoder, classifier.mlp_head
    audio, video = encoder.audio_tokens(clips[0]), encoder.video_tokens(clips[1])

    def pooled(tokens, norms):
        return encoder.join(tokens, norms).mean(1)

    expected = {
        "multimodal": head(pooled(torch.cat([audio, video], 1), "fusion")),
        "audio": head(pooled(audio, "audio")),
        "video": head(pooled(video, "video")),
        "missing_audio": head((pooled(audio, "fusion") + pooled(audio, "audio")) / 2),
        "missing_video": head((pooled(video, "fusion") + pooled(video, "video")) / 2),
    }
    for mode, logits in expected.items():
        torch.testing.assert_close(classifier.logits(*clips, mode), logits)


def test_single_modality_modes_do_not_need_the_other(clips):
    classifier = _classifier()
    for mode, given in [("audio", (clips[0], None)), ("missing_video", (None, clips[1]))]:
        torch.testing.assert_close(
            classifier.logits(*given, mode), classifier.logits(*clips, mode), atol=0, rtol=0
        )


@pytest.mark.parametrize("auxiliary", [False, True])
def test_stream_logits_equal_the_modes_one_by_one(clips, auxiliary):
    classifier = _classifier(auxiliary=auxiliary)
    found = classifier.stream_logits(*clips)
    if auxiliary:
        expected = classifier(*clips)
    else:
        modes = {"audio": "missing_audio", "video": "missing_video", "fusion": "multimodal"}
        expected = {s: classifier.logits(*clips, mode) for s, mode in modes.items()}
    for stream in STREAMS:
        torch.testing.assert_close(found[stream], expected[stream])


def test_auxiliary_heads_do_not_change_the_fusion_logits(clips):
    plain, aided = _classifier(), _classifier(auxiliary=True)
    aided.load_state_dict(plain.state_dict(), strict=False)
    assert set(aided(*clips)) == set(STREAMS)
    assert set(plain(*clips)) == {"fusion"}
    torch.testing.assert_close(aided(*clips)["fusion"], plain(*clips)["fusion"])


@pytest.mark.parametrize("stem", _CONFIGS)
@pytest.mark.parametrize(
    "options", [{}, {"auxiliary": True}, {"mode": "audio"}, {"mode": "video"}], ids=str
)
def test_every_trainable_weight_has_a_gradient(clips, stem, options):
    classifier = _classifier(stem, **options)
    sum(logits.square().sum() for logits in classifier(*clips).values()).backward()
    for name, parameter in classifier.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert classifier.encoder.pos_embed_a.requires_grad == (options.get("mode") != "video")


def test_auxiliary_heads_of_a_single_modality_are_refused():
    with pytest.raises(ValueError, match="needs mode multimodal"):
        _classifier(mode="audio", auxiliary=True)
