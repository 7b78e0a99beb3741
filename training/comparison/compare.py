"""compare: two models' answers on the clips both have, stream by stream, as one record.

Knows nothing of where answers come from. Invariant: only clips that both answered count, and those
of one alone are listed; pairs of classes are chosen before, by whoever calls.

Shapes: M clips both answered.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.comparison.answers import Answers, Said
from training.comparison.differences import Difference, Question, differences
from training.config import STREAMS
from training.errors import TrainingError
from training.evaluation.scores import most_confused_pairs


class Truth(NamedTuple):
    """What is known of a clip."""

    label: str
    group: str


class Pairs(NamedTuple):
    """Pairs of classes to compare on."""

    names: Sequence[tuple[str, str]]
    chosen_on: str
    """Which clips they were found on."""


class Comparison(NamedTuple):
    """Two models on the same clips. Differences are b minus a."""

    a: str
    b: str
    n_clips: int
    n_groups: int
    only_a: list[str]
    """Clips that b did not answer: they count nowhere."""
    only_b: list[str]
    unknown: list[str]
    """Classes that b names and that are no label here: written otherwise, or of another list."""
    pairs_chosen_on: str
    whole: dict[str, Difference]
    """By stream: share of clips that are right."""
    classes: dict[str, list[Difference]]
    """The same, by class."""
    pairs: dict[str, list[Difference]]
    """By pair of classes: share of their clips that are taken for the other one. Less is better."""

    def as_json(self) -> dict[str, Any]:
        """Strict JSON: what has no interval has none."""
        return {
            **{k: v for k, v in self._asdict().items() if not isinstance(v, dict)},
            "streams": {
                stream: {
                    "all": _record(self.whole[stream]),
                    "classes": [_record(each) for each in self.classes[stream]],
                    "pairs": [_record(each) for each in self.pairs[stream]],
                }
                for stream in self.whole
            },
        }


def _record(found: Difference) -> dict[str, Any]:
    bare = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in found._asdict().items()
        if name != "name"
    }
    return {"name": " / ".join(found.name), **bare} if found.name else bare


def compare(
    a: Answers,
    b: Answers,
    truth: Mapping[str, Truth],
    pairs: Pairs,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare on the clips that both answered and whose label is known.

    Raises: TrainingError if there is no such clip, no stream both have, or no class that b names
        is known here.
    """
    rows_b = {clip_id: i for i, clip_id in enumerate(b.clip_ids)}
    common = [(i, rows_b[c]) for i, c in enumerate(a.clip_ids) if c in rows_b and c in truth]
    streams = [stream for stream in STREAMS if stream in a.said and stream in b.said]
    if not common or not streams:
        raise _nothing_in_common(a, b, "stream" if common else "clip")
    known = [truth[a.clip_ids[i]] for i, _ in common]
    groups, groups_M = np.unique([each.group for each in known], return_inverse=True)
    families = []
    for stream in streams:
        said_a = [a.said[stream][i] for i, _ in common]
        said_b = [b.said[stream][i] for _, i in common]
        families += _questions([each.label for each in known], said_a, said_b, pairs.names)
    found = differences(families, groups_M, resamples, seed)
    by_stream = {s: found[3 * i : 3 * i + 3] for i, s in enumerate(streams) if found[3 * i]}
    return Comparison(
        a=a.name,
        b=b.name,
        n_clips=len(common),
        n_groups=len(groups),
        only_a=[clip_id for clip_id in a.clip_ids if clip_id not in rows_b],
        only_b=sorted(set(b.clip_ids) - set(a.clip_ids)),
        unknown=_unknown(b, a, truth),
        pairs_chosen_on=pairs.chosen_on,
        whole={s: answers[0][0] for s, answers in by_stream.items()},
        classes={s: answers[1] for s, answers in by_stream.items()},
        pairs={s: answers[2] for s, answers in by_stream.items()},
    )


def _nothing_in_common(a: Answers, b: Answers, what: str) -> TrainingError:
    return TrainingError(
        f"{a.name} and {b.name} have no {what} in common: {', '.join(a.said)} of "
        f"{len(a.clip_ids)} clips such as {a.clip_ids[0]}; {', '.join(b.said)} of "
        f"{len(b.clip_ids)} such as {b.clip_ids[0]}"
    )


def confused_pairs(models: Sequence[Answers], truth: Mapping[str, Truth], most: int) -> Pairs:
    """The pairs that the models' answers confuse most, all models counted together."""
    classes = sorted({each.label for each in truth.values()})
    position = {name: i for i, name in enumerate(classes)}
    counts_CC = np.zeros((len(classes), len(classes)), np.int64)
    for model in models:
        said = model.said.get("fusion", next(iter(model.said.values())))
        for clip_id, one in zip(model.clip_ids, said, strict=True):
            if clip_id in truth and one and one[0] in position:
                counts_CC[position[truth[clip_id].label], position[one[0]]] += 1
    pairs = most_confused_pairs(counts_CC, most)
    return Pairs([(classes[p.first], classes[p.second]) for p in pairs], "the clips compared")


def _questions(
    labels: Sequence[str],
    said_a: Sequence[Said],
    said_b: Sequence[Said],
    pairs: Sequence[tuple[str, str]],
) -> list[list[Question]]:
    """Of one stream: on all clips, on those of each class, on those of each pair."""
    both = np.array(
        [i for i, (x, y) in enumerate(zip(said_a, said_b, strict=True)) if None not in (x, y)],
        np.int64,
    )
    right_a, right_b = (_named(labels, said) for said in (said_a, said_b))
    of_class: dict[str, list[int]] = {}
    for i in both.tolist():
        of_class.setdefault(labels[i], []).append(i)
    whole = Question((), both, right_a[both], right_b[both])
    classes = []
    for name in sorted(of_class):
        clips = np.array(of_class[name], np.int64)
        classes.append(Question((name,), clips, right_a[clips], right_b[clips]))
    confused = []
    for first, second in pairs:
        clips = np.array(of_class.get(first, []) + of_class.get(second, []), np.int64)
        own = [labels[i] for i in clips]
        other = [second if label == first else first for label in own]
        # A model that names both classes does not take one for the other.
        taken = [
            _named(other, given) & ~_named(own, given)
            for given in ([said[i] for i in clips] for said in (said_a, said_b))
        ]
        confused.append(Question((first, second), clips, *taken))
    return [[whole], classes, confused]


def _named(names: Sequence[str], said: Sequence[Said]) -> NDArray[np.bool_]:
    """Whether each name is among the classes said of its clip."""
    return np.array([name in (one or ()) for name, one in zip(names, said, strict=True)], bool)


def _unknown(b: Answers, a: Answers, truth: Mapping[str, Truth]) -> list[str]:
    """Names of b that are neither a label nor a class of a.

    Raises: TrainingError if all are: b would be wrong everywhere by the way it writes names.
    """
    known = {each.label for each in truth.values()}
    known |= {*a.classes} | {name for said in a.said.values() for one in said for name in one or ()}
    named = {name for said in b.said.values() for one in said for name in one or ()}
    if named and not named & known:
        raise TrainingError(
            f"{b.name}: none of the {len(named)} names in it, such as {min(named)!r}, is a class "
            f"of {a.name}, such as {min(known)!r}. Classes are matched by name: write them as the "
            "run does, or say with --classes which ones its scores are of"
        )
    return sorted(named - known)
