"""Predictor: decoded clips to answers, as evaluation would have given them.

Pure but for reading the model: knows nothing of where clips come from or how answers are shown.
Invariant: probabilities and embeddings are those `diccae evaluate` gives the same clip: the same
frames, passes, normalisation and precision.

Shapes: n clips, C classes, P embedding width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.reasons import Rejected
from training.config import STREAMS, DataConfig
from training.data.frames import middle_frames
from training.errors import WeightsError
from training.predict.apply import Model, Models, test_passes
from training.predict.clips import Decoded, Features
from training.predict.find import Saved
from training.weights.card import Applied, ModelCard
from training.weights.files import read_card
from training.weights.measured import ClassConfusion, Measured, read_measured

_BATCH = 16
"""Most clips applied together."""


class Guess(NamedTuple):
    """A class and its probability."""

    name: str
    p: float


class StreamAnswer(NamedTuple):
    """What one stream takes a clip for."""

    guesses: list[Guess]
    """The most probable classes, most probable first."""
    margin: float
    """How sure it is: the probability of the first class minus that of the second."""


class Answer(NamedTuple):
    """What a model says of one clip, or why it says nothing."""

    rejected: Rejected | None = None
    streams: Mapping[str, StreamAnswer] = {}
    """By stream; empty without a classifier."""
    confused: ClassConfusion | None = None
    """Of the class it was taken for, as evaluation found it."""
    embeddings: Mapping[str, NDArray[np.float32]] = {}
    """[P] by stream, if they were asked for."""
    used_s: float = 0.0
    """How much of the clip it rests on, from the beginning: the model's features have a length."""
    clip_s: float = 0.0
    """How long the clip is."""

    @property
    def main(self) -> StreamAnswer | None:
        """Of the fusion stream, or of the only one there is."""
        return self.streams.get("fusion", next(iter(self.streams.values()), None))


class Predictor:
    """A saved model, ready for clips.

    Args: embeddings: whether the encoder is applied, too. device: cuda computes in bf16, as an
        evaluation on a GPU does that is not told otherwise.
    Raises: WeightsError if the model cannot be read or does not say how it is applied.
    """

    def __init__(
        self, saved: Saved, *, top: int = 5, embeddings: bool = False, device: str = "cpu"
    ) -> None:
        kind = "classifier" if saved.classifier else "encoder"
        card, digest = read_card(saved.main, kind)
        self.measured = read_measured(saved.main, digest)
        self._applied = _applied(saved.main, card, self.measured)
        self._classes, self._top, self._spec = card.classes, top, saved.spec
        self._space = self._applied.space if embeddings else None
        assert card.statistics is not None  # `find_models` takes no other model.
        data = DataConfig(fbank_mean=card.statistics.mean, fbank_std=card.statistics.std)
        models = Models(saved.encoder if embeddings else None, saved.classifier)
        self._model = Model(models, data, device)

    @property
    def streams(self) -> list[str]:
        """Those that the classifier answers for; none without one."""
        classifier = self._model.classifier
        if classifier is None:
            return []
        return list(STREAMS) if classifier.mode == "multimodal" else [classifier.mode]

    def answers(self, clips: Iterable[Decoded]) -> Iterator[tuple[Decoded, Answer]]:
        """Each clip with its answer, in order; the first alone, so that it comes at once."""
        rest, n = iter(clips), 1
        while batch := list(islice(rest, n)):
            n = min(2 * n, _BATCH)
            decoded = [clip for clip in batch if isinstance(clip, Features)]
            found = iter(self._apply(decoded) if decoded else ())
            for clip in batch:
                yield clip, Answer(clip) if isinstance(clip, Rejected) else next(found)

    def _apply(self, clips: Sequence[Features]) -> list[Answer]:
        F = self._applied.frames_per_clip
        n_passes = test_passes(self._spec.n_frames, F, self._applied.frames)
        which = middle_frames(self._spec.n_frames, F * n_passes)
        fbank_nTM = np.stack([clip.fbank_TM for clip in clips])
        frames_nFHWC = np.stack([clip.frames(which) for clip in clips])
        outputs = self._model(fbank_nTM, frames_nFHWC, n_passes)
        vectors = outputs.of(self._space) if self._space else {}
        return [
            self._answer(
                {s: outputs.p[s][i] for s in STREAMS if s in outputs.p},
                {s: vectors[s][i] for s in STREAMS if s in vectors},
            )._replace(used_s=clip.used_s, clip_s=clip.clip_s)
            for i, clip in enumerate(clips)
        ]

    def _answer(
        self, p: Mapping[str, NDArray[np.float32]], vectors: Mapping[str, NDArray[np.float32]]
    ) -> Answer:
        answer = Answer(
            streams={stream: self._stream(p_C) for stream, p_C in p.items()}, embeddings=vectors
        )
        if answer.main is None or self.measured is None:
            return answer
        return answer._replace(confused=self.measured.confusion_of(answer.main.guesses[0].name))

    def _stream(self, p_C: NDArray[np.float32]) -> StreamAnswer:
        # A stable sort: of equal ones the class that argmax takes comes first.
        order = np.argsort(-p_C, kind="stable")[: max(self._top, 2)].tolist()
        guesses = [Guess(self._classes[k], float(p_C[k])) for k in order]
        second = guesses[1].p if len(guesses) > 1 else 0.0
        return StreamAnswer(guesses[: self._top], guesses[0].p - second)


def _applied(uri: str, card: ModelCard, measured: Measured | None) -> Applied:
    """As it was measured; else as the run it is from would be."""
    if measured is not None:
        return Applied(**measured.applied)
    if card.applied is None:
        raise WeightsError(
            f"{uri}: its card does not say how many frames it is applied to: it was saved by an "
            "older diccae; run diccae evaluate on its run, which writes that down"
        )
    return card.applied
