"""The few shapes of HTML that a report is built of.

Pure strings: knows nothing of runs. Invariant: text that comes from data is escaped here.
"""

import html
import math
from collections.abc import Iterable, Sequence

from training.report.examples import Example


def text(value: object) -> str:
    """A value as HTML text or attribute."""
    return html.escape(str(value), quote=True)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.{digits}f} %"


def number(value: object) -> str:
    """A number to three or four figures, whole numbers with thin spaces."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u2009")
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 850 ms, 41 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def section(anchor: str, title: str, lead: str, *body: str) -> str:
    """A section with its heading and one sentence on how to read it."""
    inner = "\n".join(body)
    return (
        f'<section id="{anchor}"><h2>{text(title)}</h2>\n'
        f'<p class="lead">{text(lead)}</p>\n{inner}</section>'
    )


def absent(anchor: str, title: str, why: str) -> str:
    """The place of a part that this run does not have."""
    return (
        f'<section id="{anchor}"><h2>{text(title)}</h2><p class="absent">{text(why)}</p></section>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of finished cells; a cell may bring its own `<td>`."""
    top = "".join(f"<th>{text(name)}</th>" for name in head)
    lines = "".join(
        "<tr>" + "".join(c if c.startswith("<t") else f"<td>{c}</td>" for c in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def definitions(items: Iterable[tuple[str, str]]) -> str:
    """Name and finished HTML, side by side."""
    inner = "".join(f"<dt>{text(name)}</dt><dd>{value}</dd>" for name, value in items)
    return f"<dl>{inner}</dl>"


def picture(example: Example, uris: dict[str, str], caption: bool = True) -> str:
    """A clip's frame with its mark; a grey field if the store does not hold it."""
    uri = uris.get(example.clip_id)
    about = " · ".join(part for part in (example.clip_id, example.caption, example.about) if part)
    image = (
        f'<img src="{uri}" alt="{text(about)}" title="{text(about)}">'
        if uri
        else f'<div class="none" title="{text(about)}">no frame</div>'
    )
    mark = f' data-mark="{example.mark}"' if example.mark else ""
    below = f"<figcaption>{text(example.caption)}</figcaption>" if caption else ""
    return f"<figure{mark}>{image}{below}</figure>"


def strip(
    examples: Sequence[Example], uris: dict[str, str], per_row: int, caption: bool = True
) -> str:
    """Frames side by side."""
    inner = "".join(picture(example, uris, caption) for example in examples)
    return f'<div class="strip" style="--n:{per_row}">{inner}</div>'
