"""make_encoder and make_classifier: untrained models of a config, the same on every worker.

Knows nothing of weights files or of how they are trained. Invariant: equal config and features give
equal weights.
"""

import torch

from pipeline.config import FeatureSpec
from training.config import TrainingConfig
from training.model.classifier import Classifier
from training.model.encoder import Encoder, InputShape


def input_shape(spec: FeatureSpec) -> InputShape:
    """What the encoder sees of features of this spec."""
    return InputShape(spec.fbank_frames, spec.n_mels, spec.frame_size)


def make_encoder(config: TrainingConfig, spec: FeatureSpec) -> Encoder:
    """A new encoder, with a decoder if the loss reconstructs."""
    torch.manual_seed(config.seed)
    return Encoder(config.encoder, input_shape(spec), decoder=config.loss.reconstruction > 0)


def make_classifier(config: TrainingConfig, encoder: Encoder, n_classes: int) -> Classifier:
    """New heads on an encoder."""
    tuning = config.finetune
    torch.manual_seed(config.seed)
    auxiliary = tuning.mode == "multimodal" and tuning.auxiliary > 0
    return Classifier(encoder, n_classes, tuning.mode, auxiliary, multi_label=tuning.loss == "bce")
