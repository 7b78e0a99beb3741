"""ModelCard: what stands beside saved weights, and MadeWith, what weights say of their features.

Knows nothing of tensors or storage. Invariant: a card saved by an older version is read, what it
does not say being None.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from training.config import EncoderConfig, FbankStatistics, TrainingConfig
from training.model.encoder import InputShape
from training.weights.layouts import Layout

Space = Literal["z", "h"]
"""Embeddings: the trunk's features, or those behind the class heads."""

CAVMAE_STATISTICS = FbankStatistics(-5.081, 4.4849)
"""What CAV-MAE's published weights were trained with (YuanGongND/cav-mae, egs/vggsound)."""


class Applied(NamedTuple):
    """How a model is applied to a clip, by evaluation and by predictions alike."""

    frames_per_clip: int
    """Frames a pass sees."""
    frames: int | None
    """Frames averaged over, see EvaluateConfig.frames."""
    space: Space
    """The embeddings that were trained to match across modalities: `h`, or `z` without heads."""

    @classmethod
    def of(cls, config: TrainingConfig, space: Space | None = None) -> "Applied":
        """As this config evaluates. Args: space: of the weights; None: as this config trains."""
        trained: Space = "z" if config.loss.instance_on == "z" else "h"
        return cls(config.data.frames_per_clip, config.evaluate.frames, space or trained)


class ModelCard(NamedTuple):
    """What stands beside saved weights."""

    config: EncoderConfig
    shape: InputShape
    classes: list[str]
    """Names of the classifier's classes in the order of its logits; of an encoder: may be empty."""
    feature_spec: dict[str, Any]
    """The feature spec the model was trained on."""
    provenance: dict[str, Any]
    """Run, store version, config hash: whatever pins where the weights come from."""
    mode: Literal["multimodal", "audio", "video"]
    """What a classifier was trained for."""
    auxiliary: bool
    """Whether a classifier has heads for its audio and video streams."""
    multi_label: bool
    """Whether a classifier gives each class a probability of its own."""
    statistics: FbankStatistics | None
    """What its fbanks were normalised with; None: it was saved before this was written down."""
    applied: Applied | None
    """How it is applied to a clip; None as above."""

    @property
    def space(self) -> Space | None:
        """The embeddings that its training made match across modalities, as far as it says."""
        return self.applied and self.applied.space

    @classmethod
    def parse(cls, stored: Mapping[str, Any]) -> "ModelCard":
        """From the content of the card's file.

        Raises: KeyError, TypeError or ValueError if it is no card.
        """
        known, applied = stored.get("fbank_statistics"), stored.get("applied")
        return cls(
            config=EncoderConfig(**stored["config"]),
            shape=InputShape(**stored["shape"]),
            classes=stored["classes"],
            feature_spec=stored["feature_spec"],
            provenance=stored["provenance"],
            mode=stored.get("mode", "multimodal"),
            auxiliary=stored.get("auxiliary", False),
            multi_label=stored.get("multi_label", False),
            statistics=FbankStatistics(**known) if known else None,
            applied=Applied(**applied) if applied else None,
        )


class MadeWith(NamedTuple):
    """The features a model was trained on and what it makes of them, as far as its file says."""

    statistics: FbankStatistics | None = None
    feature_spec: Mapping[str, Any] = MappingProxyType({})
    space: Space | None = None

    @classmethod
    def of(cls, layout: Layout, card: ModelCard | None) -> "MadeWith":
        """What a card says, or is known of a published layout."""
        if card is not None:
            return cls(card.statistics, card.feature_spec, card.space)
        return cls(CAVMAE_STATISTICS if layout == "cavmae" else None)
