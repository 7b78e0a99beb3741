"""The few shapes of HTML that a report is built of, and the page around them.

Pure strings: knows nothing of runs. Invariants: text that comes from data is escaped here, and
loses the passwords of its URLs: a page is passed on. A page fetches nothing; its own policy forbids
it.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.passwords import without_passwords
from training.report.clips.media import Media
from training.report.examples import Example

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title} · diccae</title><style>{css}</style></head><body>
{skip}<header class="top"><div><p class="eyebrow">diccae {kind}</p><h1>{name}</h1>
<p class="lead">{facts}</p>{tiles}</div></header>
{nav}<main>{body}</main>
<footer><div>Written by diccae {source}; needs no network.</div></footer>{scripts}</body></html>
"""


def page(
    *,
    kind: str,
    title: str,
    name: str,
    facts: str,
    body: Iterable[str],
    source: str,
    allowed: Sequence[str] = (),
    style: str = "",
    tiles: str = "",
    links: Mapping[str, str] | None = None,
    scripts: str = "",
) -> str:
    """A whole page that holds all it needs.

    Args: title: of the window; name: the heading; facts: the line below it. body: finished
        sections. source: what it was written by or from. allowed: what its policy allows beside
        styles. style: on top of page.css. tiles, scripts: finished HTML at the end of the head and
        of the page. links: titles of sections by anchor, to go to from anywhere.
    """
    skip, nav = _ways_around(links) if links else ("", "")
    return _PAGE.format(
        policy="; ".join(("default-src 'none'", "style-src 'unsafe-inline'", *allowed)),
        title=text(title),
        css=Path(__file__).with_name("page.css").read_text() + style,
        skip=skip,
        kind=text(kind),
        name=text(name),
        facts=text(facts),
        tiles=tiles,
        nav=nav,
        body="\n".join(body),
        source=text(source),
        scripts=scripts,
    )


def _ways_around(links: Mapping[str, str]) -> tuple[str, str]:
    """Past the head to the first section, and from anywhere to each."""
    anchor, of = next(iter(links.items()))
    skip = f'<a class="skip" href="#{anchor}">Skip to the {text(of.lower())}</a>\n'
    inner = "".join(f'<a href="#{anchor}">{text(of)}</a>' for anchor, of in links.items())
    return skip, f'<nav aria-label="Sections"><div>{inner}</div></nav>\n'


def text(value: object) -> str:
    """A value as HTML text or attribute, without the passwords of URLs."""
    return html.escape(without_passwords(str(value)), quote=True)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage that no line break parts; a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


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
        f'<section id="{anchor}" aria-labelledby="{anchor}-title">'
        f'<h2 id="{anchor}-title">{text(title)}</h2>\n'
        f'<p class="lead">{text(lead)}</p>\n{inner}</section>'
    )


def absent(anchor: str, title: str, why: str) -> str:
    """The place of a part that this run does not have."""
    return (
        f'<section id="{anchor}" aria-labelledby="{anchor}-title">'
        f'<h2 id="{anchor}-title">{text(title)}</h2><p class="absent">{text(why)}</p></section>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], about: str = "") -> str:
    """A table of finished cells; a cell may bring its own `<td>` or `<th>`.

    On a telephone a row becomes a block of its own, each cell with the head of its column: hence
    the heads in the cells, and the roles, which a table loses when it is laid out as blocks.

    Args: about: what it holds, for those who cannot see what stands around it.
    """
    top = "".join(f'<th scope="col" role="columnheader">{text(name)}</th>' for name in head)
    lines = "".join(f'<tr role="row">{_cells(head, row)}</tr>' for row in rows)
    label = f' aria-label="{text(about)}"' if about else ""
    return (
        f'<table role="table"{label}><thead role="rowgroup"><tr role="row">{top}</tr></thead>'
        f'<tbody role="rowgroup">{lines}</tbody></table>'
    )


def _cells(head: Sequence[str], row: Sequence[str]) -> str:
    found = []
    for name, cell in zip(head, row, strict=False):  # A remark spans the row as its one cell.
        own = cell if cell.startswith("<t") else f"<td>{cell}</td>"
        role = "rowheader" if own.startswith("<th") else "cell"
        found.append(f'{own[:3]} role="{role}" data-head="{text(name)}"{own[3:]}')
    return "".join(found)


def definitions(items: Iterable[tuple[str, str]]) -> str:
    """Name and finished HTML, side by side."""
    inner = "".join(f"<dt>{text(name)}</dt><dd>{value}</dd>" for name, value in items)
    return f"<dl>{inner}</dl>"


_SAID = {"right": "right", "wrong": "wrong", "same": "same class"}
"""What a mark's colour says, for those who do not see it."""


def picture(example: Example, media: Media, caption: bool = True) -> str:
    """A clip's frame with its mark, and its sound; a grey field if the store does not hold it."""
    uri = media.frames.get(example.clip_id)
    mark = _SAID.get(example.mark, "")
    parts = (example.clip_id, example.caption, example.about, mark)
    about = text(" · ".join(part for part in parts if part))
    image = (
        f'<img src="{uri}" alt="{about}" title="{about}" decoding="async">'
        if uri
        else f'<div class="none" title="{about}">no frame</div>'
    )
    heard = sound(example.clip_id, media)
    below = f"<figcaption>{text(example.caption)}</figcaption>" if caption else ""
    marked = f' data-mark="{example.mark}"' if example.mark else ""
    return f"<figure{marked}><div>{image}</div>{heard}{below}</figure>"


def sound(clip_id: str, media: Media) -> str:
    """A clip's spectrogram, which plays the clip where its sound is on the page."""
    spectrogram = media.spectrograms.get(clip_id)
    if spectrogram is None:
        return ""
    name, seconds = text(clip_id), f"{spectrogram.seconds:.4g}"
    image = (
        f'<img src="{spectrogram.uri}" alt="spectrogram of {name}, {seconds} s" decoding="async">'
    )
    excerpt = media.sounds.get(clip_id)
    if excerpt is None:
        return f'<div class="sound">{image}</div>'
    origin = "source" if excerpt.is_from_source else "synthesised"
    said = "its source" if excerpt.is_from_source else "its features (synthesised)"
    return (
        f'<button class="sound" data-sound="{name}" data-seconds="{seconds}" '
        f'data-origin="{origin}" aria-pressed="false" aria-label="Play {name}, from {said}" '
        f'title="Play, from {said}">{image}<i></i></button>'
        + ("" if excerpt.is_from_source else '<small class="made">synthesised</small>')
    )


def strip(examples: Sequence[Example], media: Media, per_row: int, caption: bool = True) -> str:
    """Frames side by side."""
    inner = "".join(picture(example, media, caption) for example in examples)
    return f'<div class="strip" style="--n:{per_row}">{inner}</div>'
