"""predictions_page: clips, what they look and sound like, and what a model takes them for, as HTML.

Knows nothing of models. Invariant: frames, spectrograms and sounds are in the page.

Shapes: S samples, T fbank frames, M mel bins.
"""

import base64
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg

from training.predict.clips import Features
from training.predict.predictor import Answer, StreamAnswer
from training.predict.told import confusion_sentence, unused_sentence
from training.report.clips.sound import Sound, encode_sound
from training.report.clips.spectrogram import colours
from training.report.markup import page, percent, section, table, text

_SHOWN_FRAMES = 3

_STYLE = """
.clip-looks { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; }
.clip-looks img { height: 112px; } .clip-looks audio { min-width: 240px; }
main th:nth-child(2) { text-align: left; }
"""


class Shown(NamedTuple):
    """A clip on the page."""

    name: str
    answer: Answer
    looks: str
    """Its frames, spectrogram and sound as HTML; "" of a broken clip."""


def looks(features: Features, sample_rate_hz: int) -> str:
    """A clip's pictures and sound as HTML that holds them."""
    places = np.linspace(0, len(features.jpegs) - 1, min(_SHOWN_FRAMES, len(features.jpegs)))
    images = [_image(features.jpegs[round(i)], "frame") for i in places.tolist()]
    fbank_TM = features.fbank_TM[: max(features.n_valid, 1)].astype(np.float32)
    drawn = simplejpeg.encode_jpeg(colours(fbank_TM), quality=85)
    images.append(_image(drawn, "spectrogram, low tones at the bottom"))
    sound = Sound(encode_sound(features.waveform_S, sample_rate_hz), is_from_source=True)
    images.append(f'<audio controls preload="metadata" src="{sound.uri}"></audio>')
    return f'<div class="clip-looks">{"".join(images)}</div>'


def _image(jpeg: bytes, about: str) -> str:
    data = base64.b64encode(jpeg).decode()
    return f'<img alt="{text(about)}" title="{text(about)}" src="data:image/jpeg;base64,{data}">'


def predictions_page(model: str, clips: Sequence[Shown], note: str) -> str:
    """The page. Args: note: a sentence on what the answers rest on."""
    n_broken = sum(clip.answer.rejected is not None for clip in clips)
    broken = f"; {n_broken} could not be decoded" if n_broken else ""
    return page(
        kind="predictions",
        title="Predictions",
        name=model,
        facts=f"{len(clips)} clips{broken}. {note}",
        body=[_clip(number, clip) for number, clip in enumerate(clips, 1)],
        source="predict",
        allowed=("img-src data:", "media-src data:"),
        style=_STYLE,
    )


def _clip(number: int, clip: Shown) -> str:
    anchor, answer = f"clip-{number}", clip.answer
    if answer.rejected is not None:
        why = f"{answer.rejected.reason}: {answer.rejected.detail}"
        return section(anchor, clip.name, "Not decoded.", f'<p class="absent">{text(why)}</p>')
    main = answer.main
    lead = f"{main.guesses[0].name}, {percent(main.guesses[0].p)}" if main else "Embedded."
    said = [confusion_sentence(answer.confused)] if answer.confused else []
    sentence = "".join(f"<p>{text(each)}</p>" for each in (*said, unused_sentence(answer)) if each)
    rows = [_row(stream, each) for stream, each in answer.streams.items()]
    answers = table(["stream", "takes it for", "margin"], rows) if rows else ""
    return section(anchor, clip.name, lead, clip.looks, answers, sentence)


def _row(stream: str, answer: StreamAnswer) -> list[str]:
    guesses = "<br>".join(f"{text(guess.name)} {percent(guess.p)}" for guess in answer.guesses)
    return [text(stream), f'<td style="text-align:left">{guesses}</td>', percent(answer.margin)]
