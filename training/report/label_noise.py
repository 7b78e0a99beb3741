"""The section that takes the errors apart: confusions, and what is the labels' own doing.

Reads results.json alone. Invariant: a run that was not measured on VGGSounder's labels gets no
section, not an empty one: most data sets have one label a clip and nothing to tell apart.
"""

from collections.abc import Sequence
from typing import Any

from training.config import STREAMS
from training.report.markup import number, percent, section, table, text
from training.vggsounder.noise import KINDS

_COLOURS = ("--s1", "--s2", "--s3", "--s0")
_NAMES = {
    "real": "confusion",
    "both_true": "both labels are true",
    "label_false": "only what was said is true",
    "not_perceivable": "class cannot be perceived",
}
_PAIRS = 12


def label_noise(results: dict[str, Any]) -> str:
    """The section, or nothing."""
    found = (results.get("vggsounder") or {}).get("label_noise")
    if not found:
        return ""
    labels = results["vggsounder"]["labels"]
    lead = (
        "Errors of top-1 by what VGGSounder's annotators found true of the clip, and whether it "
        "can be heard or seen. Only confusions are the model's to mend. Labels: "
        f"{labels['package']}, {labels['file']}."
    )
    streams = [stream for stream in STREAMS if stream in found]
    cards: list[str] = [f'<div class="card">{_whole(found, streams)}</div>']
    for stream in streams:
        if found[stream]["pairs"]:
            cards.append(
                f"<details><summary>Most frequent errors of {stream}</summary>"
                f'<div class="card">{_pairs(found[stream]["pairs"])}</div></details>'
            )
    return section("label-noise", "How much of the error is confusion", lead, *cards)


def _whole(found: dict[str, Any], streams: Sequence[str]) -> str:
    rows = []
    for stream in streams:
        split = found[stream]
        parts = "".join(
            f'<i style="width:{100 * split["kinds"][kind]["share"]:.2f}%;'
            f'background:var({colour})" title="{text(_NAMES[kind])}"></i>'
            for kind, colour in zip(KINDS, _COLOURS, strict=True)
        )
        shares = [percent(split["kinds"][kind]["share"]) for kind in KINDS]
        rows.append([
            f'<th scope="row">{text(stream)}</th>', number(split["n_clips"]),
            percent(split["error"]), *shares,
            f'<td style="min-width:120px"><div class="stack">{parts}</div></td>',
        ])  # fmt: skip
    return table(["", "clips judged", "error", *(_NAMES[kind] for kind in KINDS), ""], rows)


def _pairs(pairs: Sequence[dict[str, Any]]) -> str:
    rows = [
        [f'<th scope="row">{text(pair["label"])}, taken for {text(pair["said"])}</th>',
         number(pair["n"]), *(number(pair[kind]) for kind in KINDS)]
        for pair in pairs[:_PAIRS]
    ]  # fmt: skip
    return table(["", "clips", *(_NAMES[kind] for kind in KINDS)], rows)
