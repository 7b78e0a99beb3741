"""A small saved classifier and encoder without any training, in a folder laid out as a run's."""

from pathlib import Path

import torch

from pipeline.config import FeatureSpec
from training.config import EncoderConfig, FbankStatistics
from training.model.classifier import Classifier
from training.model.encoder import Encoder, InputShape
from training.weights.beside import write_readme
from training.weights.card import Applied
from training.weights.files import read_card, save_classifier, save_encoder
from training.weights.measured import ClassConfusion, Measured, ToldApart, write_measured

SPEC = FeatureSpec(n_frames=4, frame_size=32, n_mels=32, fbank_frames=96, duration_s=1.0)
CLASSES = ["dog, barking", "wolf", "<b>bell</b>", "rain"]


def saved_models(out: str, spec: FeatureSpec = SPEC) -> None:
    """`encoder/` and `classifier/` below a folder or URI; random weights, equal every time."""
    torch.manual_seed(0)
    shape = InputShape(spec.fbank_frames, spec.n_mels, spec.frame_size)
    config = EncoderConfig.model_validate({"preset": "tiny", "dim": 16, "projection": 8})
    classifier = Classifier(Encoder(config, shape), len(CLASSES), auxiliary=True)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    provenance = {"run": "small", "store": {"uri": "s3://b/vgg", "version": 7, "digest": "ab" * 32}}
    same = (CLASSES, spec.model_dump(mode="json"), provenance | {"config_hash": "c0ffee"})
    statistics, applied = FbankStatistics(-5.0, 4.0), Applied(1, None, "h")
    save_encoder(
        classifier.encoder, f"{out}/encoder", *same, statistics=statistics, applied=applied
    )
    save_classifier(classifier, f"{out}/classifier", *same, statistics=statistics, applied=applied)


def measured(out: str | Path) -> Measured:
    """Every class of `saved_models` is confused with the next one, and audio tells them apart."""
    _, digest = read_card(f"{out}/classifier", "classifier")
    told = {"audio": ToldApart(9, 10), "video": ToldApart(6, 10), "fusion": ToldApart(9, 10)}
    return Measured(
        sha256=digest,
        split="test",
        n_clips=40,
        store={"uri": "s3://b/vgg", "version": 7, "digest": "ab" * 32},
        results={"top1": {"audio": 0.5, "video": 0.25, "fusion": 0.75}, "map": {"fusion": 0.8}},
        applied=Applied(1, None, "h")._asdict(),
        confusions=[
            ClassConfusion(name, other, 0.25, 20, told, "audio")
            for name, other in zip(CLASSES, [*CLASSES[1:], CLASSES[0]], strict=True)
        ],
    )


def evaluated(out: str | Path) -> None:
    """As `diccae evaluate` leaves the classifier."""
    write_measured(f"{out}/classifier", measured(out))
    write_readme(f"{out}/classifier", "classifier")
