"""Media: the frames, spectrograms and sounds that a page shows, by clip id.

Knows nothing of HTML. Invariant: a clip that is not in the store, or a run without one, is simply
not in any of them.
"""

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from pipeline.config import FeatureSpec
from training.report.clips.listening import sounds_of
from training.report.clips.pictures import Pictures, Spectrogram
from training.report.clips.sound import Sound


class Media(NamedTuple):
    """Everything of clips that can be looked at or listened to."""

    frames: dict[str, str]
    """`data:` URIs."""
    spectrograms: dict[str, Spectrogram]
    sounds: dict[str, Sound]
    why_synthesised: Counter[str]
    """Clips whose sound is made of their fbank, by reason."""
    spec: FeatureSpec | None
    """What the features are; None without a store."""


NO_MEDIA = Media({}, {}, {}, Counter(), None)


def media_of(
    pictures: Pictures | None, framed: Collection[str], heard: Collection[str], with_sound: bool
) -> Media:
    """Read what a page shows.

    Args: framed: clips whose frame is shown; heard: clips whose sound is, as spectrogram and, if
        `with_sound`, to play.
    """
    if pictures is None:
        return NO_MEDIA
    sounds, why = sounds_of(pictures, heard) if with_sound else ({}, Counter[str]())
    frames, spectrograms = pictures.frames(framed), pictures.spectrograms(heard)
    return Media(frames, spectrograms, sounds, why, pictures.spec)
