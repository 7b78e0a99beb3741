"""The section of a report on confusion: the map of all classes, the worst pairs, each class.

Knows nothing of how frames and sounds are read. Invariant: what the map shows can be read without
it: the pairs and the classes stand in tables, and a class's whole row is told when it is searched.

The map is drawn on one canvas from the counts that are not zero: 309 classes are 95,481 cells, as
elements a page of 30 MB, as counts 60 KB a stream.

Shapes: C classes.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.evaluation.results import ConfusionCounts
from training.report.clips.media import Media
from training.report.confusions import Pair, accuracy, group_classes, pair_of, worst_pairs
from training.report.examples import Example
from training.report.folder import ReportData
from training.report.galleries import Choice, below_frames
from training.report.markup import absent, number, percent, section, strip, table, text

_TITLE = "Confusion"
_PAIRS_LISTED = 50
_TAKEN_FOR = 3
_HOW_TO = (
    "Rows: the true class; columns: what the model says. Green is right, red is wrong, stronger is "
    "more often; a box holds classes taken for each other. Wheel or + and −: zoom; drag or "
    "arrow keys: move (with Shift by ten); N, P: next and previous of the most confused; 0: all."
)


def confusion_data(run: ReportData) -> dict[str, Any] | None:
    """What the script draws: classes in the order shown, and the counts that are not zero.

    A stream's cells are numbered row by row in that order; `gaps` are the differences of their
    numbers, which are short to write down.
    """
    if run.confusion is None or not run.confusion.counts:
        return None
    order = group_classes(run.confusion.main)
    streams = {}
    for stream, counts_CC in run.confusion.counts.items():
        shown_CC = counts_CC[np.ix_(order.positions, order.positions)]
        cells = np.flatnonzero(shown_CC)
        gaps = np.diff(cells, prepend=0).tolist()
        streams[stream] = {"gaps": gaps, "counts": shown_CC.reshape(-1)[cells].tolist()}
    return {
        "classes": [run.confusion.classes[k] for k in order.positions],
        "boundaries": order.boundaries,
        "streams": streams,
    }


def confusion(run: ReportData, choice: Choice, media: Media) -> str:
    """Map, pairs with and without clips to look at, and classes."""
    if run.confusion is None or not run.confusion.counts:
        why = "No confusion matrix: this run was not fine-tuned and evaluated."
        return absent("confusion", _TITLE, why)
    body = [_map(run.confusion), _pair_table(run.confusion, choice)]
    if choice.pairs:
        cards = "".join(
            _pair_card(run.confusion, k, _Shown(*pair), media)
            for k, pair in enumerate(choice.pairs, 1)
        )
        body.append(
            "<h3>Clips of the most confused pairs</h3><p class='note'>Bars: the share of a class's "
            "clips that go to the other, mean of the two classes, by stream. Frames: test clips "
            "of each class, the confused ones first (red and crossed), with how sure the model "
            f"was. {below_frames(media)}</p>"
            f'<div class="cards pairs">{cards}</div>'
        )
    body.append(_class_table(run.confusion))
    lead = (
        "Which classes are taken for which, by stream. A pair that only the sound, or only the "
        "picture, cannot tell apart shows what the other one adds."
    )
    return section("confusion", _TITLE, lead, *body)


def _map(confusion: ConfusionCounts) -> str:
    """The canvas and what moves it; a script fills in what the chosen cell and class say."""
    streams = list(confusion.counts)
    buttons = "".join(
        f'<button data-stream="{s}" aria-pressed="{str(s == streams[-1]).lower()}">{s} '
        f"{percent(accuracy(confusion.counts[s]))}</button>"
        for s in streams
    )
    names = "".join(f'<option value="{text(name)}"></option>' for name in confusion.classes)
    return f"""<div class="card map">
<div class="tools"><div class="switch" role="group" aria-label="Stream">{buttons}</div>
<label class="find">Class <input id="find" type="search" list="classes" autocomplete="off"
 placeholder="search {len(confusion.classes)} classes"></label>
<datalist id="classes">{names}</datalist>
<div class="switch" role="group" aria-label="Zoom">
<button data-zoom="in" aria-label="zoom in">+</button>
<button data-zoom="out" aria-label="zoom out">−</button>
<button data-zoom="all">all</button></div></div>
<div id="heat"><canvas tabindex="0" role="application" aria-roledescription="confusion matrix"
 aria-label="Confusion matrix, rows are true classes, columns what they are taken for"
 aria-describedby="cell heat-keys"></canvas></div>
<output id="cell" aria-live="polite">&#160;</output>
<p class="key" id="heat-keys">{_HOW_TO}</p>
<div id="of-class" aria-live="polite"></div></div>"""


def _pair_table(confusion: ConfusionCounts, choice: Choice) -> str:
    streams = list(confusion.counts)
    shown = {(pair.a, pair.b): k for k, (pair, _, _) in enumerate(choice.pairs, 1)}
    pairs = worst_pairs(confusion.main, _PAIRS_LISTED)
    if not pairs:
        return ""
    rows = []
    for pair in pairs:
        a, b = text(confusion.classes[pair.a]), text(confusion.classes[pair.b])
        card = shown.get((pair.a, pair.b))
        clips = f'<a href="#pair-{card}">clips</a>' if card else ""
        see = f'<button class="link" data-row="{a}" data-column="{b}">map</button>'
        rows.append([
            f'<th scope="row">{a} ↔ {b}</th>',
            *(percent(pair_of(confusion.counts[s], pair.a, pair.b).rate) for s in streams),
            f"{pair.a_as_b} of {pair.n_a}", f"{pair.b_as_a} of {pair.n_b}", f"{clips} {see}",
        ])  # fmt: skip
    head = ["pair", *streams, "first as second", "second as first", "see"]
    first = table(head, rows[:10], "The ten most confused pairs")
    rest = table(head, rows[10:], "More confused pairs") if rows[10:] else ""
    if rest:
        rest = f"<details><summary>{len(rows) - 10} more pairs</summary>{rest}</details>"
    return (
        "<h3>Most confused pairs</h3><p class='note'>By the share of a class's clips that go to "
        f"the other, mean of the two classes; counts are those of {streams[-1]}.</p>"
        f'<div class="card names">{first}{rest}</div>'
    )


def _class_table(confusion: ConfusionCounts) -> str:
    """Each class by itself, the hardest first; folded, since there may be hundreds."""
    streams = list(confusion.counts)
    main = "fusion" if "fusion" in streams else streams[0]
    hardest = sorted(confusion.accuracies(), key=lambda each: each.by_stream[main])
    rows_of = dict(zip(confusion.classes, confusion.main, strict=True))
    rows = [
        [
            f'<th scope="row">{text(each.name)}</th>',
            number(each.n_clips),
            *(percent(each.by_stream[s]) for s in streams),
            f'<td class="words">{_taken_for(confusion, rows_of[each.name], each.name)}</td>',
        ]
        for each in hardest
    ]
    inner = table(["class", "clips", *streams, "most often taken for"], rows, "Accuracy by class")
    return (
        "<details><summary>Accuracy of each class, hardest first</summary>"
        f'<div class="card names">{inner}</div></details>'
    )


def _taken_for(confusion: ConfusionCounts, counts_C: NDArray[np.int64], own: str) -> str:
    order = np.argsort(-counts_C, kind="stable")[: _TAKEN_FOR + 1]
    named = [(confusion.classes[k], counts_C[k]) for k in order if counts_C[k]]
    return text(", ".join(f"{name} ({n})" for name, n in named if name != own)) or "–"


class _Shown(NamedTuple):
    """A pair with clips of both classes."""

    pair: Pair
    of_a: list[Example]
    of_b: list[Example]


def _pair_card(confusion: ConfusionCounts, number_of: int, shown: _Shown, media: Media) -> str:
    pair, of_a, of_b = shown
    a, b = text(confusion.classes[pair.a]), text(confusion.classes[pair.b])
    strips = "".join(
        f'<div><p class="way">{name}: {taken} of {n} taken for {other}</p>'
        f"{strip(examples, media, 4) if examples else ''}</div>"
        for name, other, taken, n, examples in (
            (a, b, pair.a_as_b, pair.n_a, of_a),
            (b, a, pair.b_as_a, pair.n_b, of_b),
        )
    )
    bars = "".join(_rate_bar(s, pair_of(n, pair.a, pair.b)) for s, n in confusion.counts.items())
    return (
        f'<article class="card pair" id="pair-{number_of}"><header><h4>{a} ↔ {b}</h4>'
        f"<span>{percent(pair.rate)}</span></header>"
        f'<div class="bars">{bars}</div>{strips}</article>'
    )


def _rate_bar(stream: str, pair: Pair) -> str:
    return (
        f"<span>{stream}</span><i><i style='width:{100 * pair.rate:.1f}%;"
        f"background:var(--{stream})'></i></i><span>{percent(pair.rate)}</span>"
    )
