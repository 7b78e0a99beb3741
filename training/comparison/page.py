"""The comparison of two models as one self-contained HTML page.

Knows nothing of how it was computed. Invariant: the page fetches nothing and runs nothing; every
number of the record is on it, and every clip that was left out.
"""

import math
from collections.abc import Sequence

from training.comparison.compare import Comparison
from training.comparison.differences import Difference
from training.report.markup import absent, number, page, percent, section, table, text

_STYLE = """
.range { display: block; width: 120px; height: 16px; }
tbody th { white-space: normal; }
.range line { stroke: var(--soft); stroke-width: 2; }
.range .zero { stroke: var(--line); stroke-width: 1; }
.range circle { fill: var(--ink); }
"""
_WIDTH, _HEIGHT = 120, 16
_HEAD = ("", "clips", "a", "b", "b − a", "95 % interval", "", "only a", "only b", "p", "p (Holm)")


def comparison_page(found: Comparison) -> str:
    """The page's text."""
    facts = (
        f"a = {found.a}, b = {found.b}: {number(found.n_clips)} clips of "
        f"{number(found.n_groups)} recordings that both answered"
    )
    body = [
        _section("all", "All clips", "Share of clips that are right (top-1).",
                 [(stream, one) for stream, one in found.whole.items()]),
        _by_stream(
            "pairs",
            "Confused pairs",
            "Share of the clips of two classes that are taken for the other one: less is better. "
            f"The pairs were chosen on {found.pairs_chosen_on}.",
            found.pairs,
        ),
        _by_stream("classes", "Classes", "Share of a class's clips that are right.", found.classes),
        _left_out(found),
    ]  # fmt: skip
    title = f"{found.b} against {found.a}"
    return page(
        kind="comparison",
        title=title,
        name=title,
        facts=facts,
        body=body,
        source="from predictions of clips",
        style=_STYLE,
    )


def _by_stream(anchor: str, title: str, lead: str, found: dict[str, list[Difference]]) -> str:
    """The clearest differences first."""
    rows = [
        (f"{' / '.join(one.name)}, {stream}", one)
        for stream, answers in found.items()
        for one in answers
    ]
    rows.sort(key=lambda row: (row[1].p, -abs(row[1].difference)))
    return _section(anchor, title, lead, rows)


def _section(anchor: str, title: str, lead: str, rows: Sequence[tuple[str, Difference]]) -> str:
    if not rows:
        return absent(anchor, title, "None to compare on.")
    ends = [abs(x) for _, one in rows for x in (one.low, one.high, one.difference) if x == x]
    widest = max(ends) or 1.0
    cells = [
        [
            f'<th scope="row">{text(name)}</th>', number(one.n_clips), percent(one.a),
            percent(one.b), _points(one.difference), _interval(one), _range(one, widest),
            number(one.only_a), number(one.only_b), f"{one.p:.2g}", f"{one.p_holm:.2g}",
        ]
        for name, one in rows
    ]  # fmt: skip
    note = (
        " Intervals: bootstrap over recordings. p: exact McNemar test; Holm: corrected for the "
        "questions of a stream in this table."
    )
    return section(
        anchor, title, lead + note, f'<div class="card dense">{table(_HEAD, cells)}</div>'
    )


def _points(x: float) -> str:
    return f"{100 * x:+.1f}".replace("-", "−")


def _interval(one: Difference) -> str:
    return "–" if math.isnan(one.low) else f"{_points(one.low)} to {_points(one.high)}"


def _range(one: Difference, widest: float) -> str:
    """The difference with its interval on a common scale, 0 in the middle."""

    def x(value: float) -> float:
        return _WIDTH / 2 + value / widest * (_WIDTH / 2 - 6)

    middle = _HEIGHT / 2
    line = (
        ""
        if math.isnan(one.low)
        else f'<line x1="{x(one.low):.1f}" x2="{x(one.high):.1f}" y1="{middle}" y2="{middle}"/>'
    )
    return (
        f'<svg class="range" viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">'
        f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="0" y2="{_HEIGHT}"/>{line}'
        f'<circle cx="{x(one.difference):.1f}" cy="{middle}" r="3.5"/></svg>'
    )


def _left_out(found: Comparison) -> str:
    lists = [
        (f"{number(len(names))} {what}", names)
        for what, names in (
            ("clips that only a answered", found.only_a),
            ("clips that only b answered", found.only_b),
            ("names of b that are no class here", found.unknown),
        )
    ]
    body = [
        f"<details><summary>{title}</summary><pre>{text(chr(10).join(names))}</pre></details>"
        if names
        else f"<p>{title}</p>"
        for title, names in lists
    ]
    return section("left-out", "Left out", "These count in no number above.", *body)
