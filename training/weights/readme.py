"""model_readme: the card of a saved model as Markdown, as Hugging Face's hub reads it.

Pure strings: knows nothing of tensors or storage. Invariant: it says what the card and the
evaluation say, and names what is not known.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from training.config import STREAMS
from training.weights.measured import ClassConfusion, Measured

_MOST_CONFUSED = 10
_LIMITS = """## Limits

- It names one of the classes it was trained on, whatever it is given: there is no "none of these".
- Probabilities are not calibrated; the margin between first and second class orders answers by
  how sure they are.
- It was measured on clips of its own data set; others may be cut, lit and recorded otherwise.
"""


def model_readme(
    card: Mapping[str, Any], measured: Measured | None, command: str | None = None
) -> str:
    """Front matter and text.

    Args: card: content of `classifier.json` or `encoder.json`; command: how to use it, where that
        is not as a saved model's folder.
    """
    name = card["provenance"].get("run") or f"diccae {card['kind']}"
    parts = [
        _front_matter(card, measured),
        f"# {name}\n\n{_about(card)}",
        _table("Data and recipe", ("", ""), _origin(card)),
        _results(measured),
        _confusions(measured),
        f"## Use\n\n```sh\n{command or _of_folder(card)}\n```\n",
        _LIMITS,
    ]
    return "\n".join(part for part in parts if part)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of n clips (Wilson 1927), which stays in [0, 1] at both ends."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _front_matter(card: Mapping[str, Any], measured: Measured | None) -> str:
    """JSON values are YAML, and need no quoting rules of our own."""
    store = card["provenance"].get("store") or {}
    fields: dict[str, Any] = {
        "library_name": "diccae",
        "tags": ["audio-visual", "diccae", card["kind"]],
        "pipeline_tag": "video-classification" if card["kind"] == "classifier" else None,
    }
    if measured is not None:
        data = {"name": str(store.get("uri", "")).rsplit("/", 1)[-1], "type": "feature-store"}
        metrics = [
            {"name": f"{metric} {stream}", "type": "accuracy", "value": round(value, 6)}
            for metric, by_stream in measured.results.items()
            if metric.startswith("top")
            for stream, value in by_stream.items()
        ]
        result = {
            "task": {"type": "video-classification"},
            "dataset": data | {"split": measured.split},
            "metrics": metrics,
        }
        fields["model-index"] = [
            {"name": card["provenance"].get("run") or "diccae", "results": [result]}
        ]
    lines = [
        f"{key}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in fields.items()
        if value is not None
    ]
    return "\n".join(["---", *lines, "---", ""])


def _about(card: Mapping[str, Any]) -> str:
    n_classes, config = len(card["classes"]), card["config"]
    what = (
        f"An audio-visual classifier of {n_classes} classes"
        if card["kind"] == "classifier"
        else "An audio-visual encoder"
    )
    return (
        f"{what}, trained with diccae (DICCAE, arXiv 2507.09323): {config['dim']} wide, "
        f"{config['depth']} blocks a modality, {config['joint_depth']} joint.\n"
    )


def _origin(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    made, store = card["provenance"], card["provenance"].get("store") or {}
    statistics = card.get("fbank_statistics")
    rows = {
        "data set": store.get("uri"),
        "store version": store.get("version"),
        "store digest": store.get("digest"),
        "recipe digest": made.get("config_hash"),
        "weights imported from": made.get("weights"),
        "fbank mean and std": f"{statistics['mean']}, {statistics['std']}" if statistics else None,
        "sha256 of the tensors": card.get("sha256"),
    }
    return [(name, f"`{value}`" if value is not None else "not known")
            for name, value in rows.items()
            if value is not None or name != "weights imported from"]  # fmt: skip


def _results(measured: Measured | None) -> str:
    if measured is None:
        return "## Results\n\nNot evaluated yet (`diccae evaluate`).\n"
    rows = []
    for metric, by_stream in measured.results.items():
        for stream in (s for s in STREAMS if s in by_stream):
            value = by_stream[stream]
            interval = "-"
            if metric.startswith("top"):
                low, high = wilson(value, measured.n_clips)
                interval = f"{100 * low:.1f} to {100 * high:.1f}"
            rows.append((metric, stream, f"{100 * value:.1f}", interval))
    head = ("metric", "stream", "%", "95 % interval")
    title = f"Results on {measured.n_clips:,} clips ({measured.split})"
    return _table(title, head, rows)


def _confusions(measured: Measured | None) -> str:
    if measured is None or not measured.confusions:
        return ""
    pairs = {frozenset((each.name, each.other)): each for each in measured.confusions}
    worst = sorted(pairs.values(), key=lambda each: (-each.degree, each.name))[:_MOST_CONFUSED]
    rows = [
        (each.name, each.other, f"{100 * each.degree:.1f}", _decided_by(each)) for each in worst
    ]
    return _table("What it confuses", ("class", "with", "% of clips", "decided by"), rows)


def _decided_by(confused: ClassConfusion) -> str:
    if not confused.told_apart:
        return "not known: evaluate again"
    return confused.decided_by or "neither"


def _of_folder(card: Mapping[str, Any]) -> str:
    wanted = "" if card["kind"] == "classifier" else " --embeddings vectors.parquet"
    return f"diccae predict --model THIS_FOLDER{wanted} clip.mp4"


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table under a heading; a class name may hold any character."""
    lines = [f"## {title}", "", _row(head), _row(("---",) * len(head)), *map(_row, rows), ""]
    return "\n".join(lines)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
