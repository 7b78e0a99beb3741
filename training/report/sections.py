"""The sections of a report that are numbers: results, curves, time, and what pins the run.

Knows nothing of frames or of the feature store. Invariant: a number shown stands in the run folder.
"""

import json
import math
from typing import Any, NamedTuple

import numpy as np

from clustering.rounds.protocol import PublishedRound
from training.config import STREAMS
from training.evaluation import metrics
from training.evaluation.metrics import Grid, Metric
from training.report.curves import (
    Column,
    Panel,
    Series,
    TimePart,
    panels,
    phase_seconds,
    step_seconds,
    unchanging,
)
from training.report.folder import ReportData
from training.report.markup import (
    absent,
    definitions,
    duration,
    number,
    percent,
    section,
    table,
    text,
)

_COLOURS = ("--s1", "--s2", "--s3", "--s4", "--s5", "--s6", "--s7", "--s0")
_ROUND_PANELS = (
    ("Agreement with the true labels", ("nmi", "purity", "hungarian_accuracy")),
    ("Churn from round to round", ("churn",)),
    ("Effective clusters", ("effective_clusters",)),
    ("Share of clips with a label", ("coverage",)),
)


def tiles(run: ReportData) -> str:
    """The few numbers that a reader wants first."""
    top1 = run.results.get("top1") or {}
    shown = [
        (f"{s} top-1", percent(top1[s]), s == "fusion") for s in reversed(STREAMS) if s in top1
    ]
    if not shown:
        probe = run.results.get("probe") or {}
        shown = [(f"{s} probe", percent(probe[s]), s == "fusion") for s in STREAMS if s in probe]
    for key, name in (("n_test", "test clips"), ("n_train", "training clips")):
        if key in run.results:
            shown.append((name, number(run.results[key]), False))
    nmi = (run.results.get("pseudo_labels") or {}).get("nmi")
    if isinstance(nmi, int | float):
        shown.append(("pseudo-label NMI", f"{nmi:.3f}", False))
    inner = "".join(
        f'<li class="tile{" main" * main}"><b>{value}</b><span>{text(name)}</span></li>'
        for name, value, main in shown
    )
    return f'<ul class="tiles" aria-label="The main numbers">{inner}</ul>'


def results(run: ReportData) -> str:
    """What was measured: by stream in one table, the rest in tables of their own."""
    found = run.results
    measured = metrics.present(found)
    if not measured:
        return absent("results", "Results", "No results: results.json holds no accuracy.")
    by_stream = [metric for metric in measured if metric.grid is None]
    tables = [_stream_table(found, by_stream)] if by_stream else []
    tables += [
        f"<h3>{text(metric.title)}</h3>{_grid_table(metric, metric.grid, found[metric.name])}"
        for metric in measured
        if metric.grid is not None
    ]
    # Each as wide as the page: beside another one its last columns would be out of sight.
    cards = "".join(f'<div class="card wide">{each}</div>' for each in tables)
    n_test = number(found.get("n_test", "?"))
    clips = f"{n_test} {text(found.get('split', 'test'))} clips"
    lead = f"On {clips} that no training step has seen; the best of a column is green."
    pairs = (found.get("confusion") or {}).get("training_pairs")
    if pairs:
        lead += (
            f" Confused pairs: the right one of two classes, over the {len(pairs)} pairs that "
            "training clips confuse most."
        )
    return section("results", "Results", lead, f'<div class="cards">{cards}</div>')


def _stream_table(found: dict[str, Any], measured: list[Metric]) -> str:
    best = {
        metric.name: max((v for v in found[metric.name].values() if v is not None), default=None)
        for metric in measured
    }
    rows = []
    named = {stream for metric in measured for stream in found[metric.name]}
    for stream in (*STREAMS, *sorted(named - set(STREAMS))):
        colour = f"--{stream}" if stream in STREAMS else "--s0"
        dot = f'<i class="dot" style="background:var({colour})"></i>'
        cells = [f'<th scope="row">{dot}{text(stream)}</th>']
        for metric in measured:
            value = found[metric.name].get(stream)
            best_class = ' class="best"' if value is not None and value == best[metric.name] else ""
            cells.append(f"<td{best_class}>{percent(value)}</td>")
        rows.append(cells)
    return table(["stream", *(metric.title for metric in measured)], rows, "Results by stream")


def _grid_table(metric: Metric, grid: Grid, values: dict[str, Any]) -> str:
    columns = [
        (name, title)
        for name, title in grid.columns
        if any(f"{row}_{name}" in values for row, _ in grid.rows)
    ]
    rows = [
        [f'<th scope="row">{title}</th>']
        + [f"<td>{percent(values.get(f'{row}_{name}'))}</td>" for name, _ in columns]
        for row, title in grid.rows
    ]
    among = f"among {number(values['n_clips'])} clips" if "n_clips" in values else ""
    return table([among, *(title for _, title in columns)], rows, metric.title)


class Curves(NamedTuple):
    """What the script draws, and what there is no curve of."""

    panels: list[dict[str, Any]]
    still: dict[str, list[tuple[str, float]]]
    """Metrics that never changed with their value, by stage."""


def curve_panels(run: ReportData) -> Curves:
    """Curves of each stage by its steps, then those of rounds by round."""
    of_rounds, still_rounds = _round_panels(run.rounds)
    stages = {
        "pretraining": panels(run.metrics),
        "finetuning": panels(run.finetuning),
        "rounds": of_rounds,
    }
    drawn = [_panel(panel, stage) for stage, found in stages.items() for panel in found]
    still = {
        "pretraining": unchanging(run.metrics),
        "finetuning": unchanging(run.finetuning),
        "rounds": still_rounds,
    }
    return Curves(drawn, still)


def _panel(panel: Panel, stage: str) -> dict[str, Any]:
    return {
        "title": panel.title,
        "stage": stage,
        "series": [
            {"name": s.name, "colour": _colour(s.name, i), "points": [list(p) for p in s.points]}
            for i, s in enumerate(panel.series)
        ],
    }


def _colour(name: str, index: int) -> str:
    last = name.replace("_", "/").rsplit("/", 1)[-1]
    if last in STREAMS:
        return f"--{last}"
    return "--s0" if name == "loss" else _COLOURS[index % len(_COLOURS)]


def _round_panels(rounds: list[PublishedRound]) -> tuple[list[Panel], list[tuple[str, float]]]:
    found: list[Panel] = []
    still: list[tuple[str, float]] = []
    for title, names in _ROUND_PANELS:
        moving = []
        for name in names:
            points = [(r.round, r.health[name]) for r in rounds if _has(r, name)]
            steps, values = np.array([n for n, _ in points]), np.array([v for _, v in points])
            if Column(steps, values).is_still:
                still.append((name, float(values[0])))
            elif points:
                moving.append(Series(name, points))
        if moving and len(rounds) > 1:
            found.append(Panel(title, moving))
    return found, still


def _has(done: PublishedRound, name: str) -> bool:
    return math.isfinite(done.health.get(name, math.nan))


def charts(curves: Curves, stage: str) -> str:
    """Places for the charts of one stage, with their legends; below them what never changed."""
    boxes = [_chart(i, panel) for i, panel in enumerate(curves.panels) if panel["stage"] == stage]
    still = ", ".join(f"{text(name)} {number(value)}" for name, value in curves.still[stage])
    line = f'<p class="note still">The same throughout: {still}.</p>' if still else ""
    return f'<div class="cards">{"".join(boxes)}</div>{line}'


def _chart(index: int, panel: dict[str, Any]) -> str:
    series = panel["series"]
    legend = "".join(
        f'<span><i style="background:var({line["colour"]})"></i>{text(line["name"])}</span>'
        for line in series
    )
    wide = " wide" if len(series) > 3 else ""
    label = f"{panel['title']}: {', '.join(map(_in_words, series))}"
    return (
        f'<div class="card chart{wide}"><h4>{text(panel["title"])}</h4>'
        f'<div class="legend">{legend}</div>'
        f'<div data-panel="{index}"><svg role="img" aria-label="{text(label)}"></svg></div></div>'
    )


def _in_words(line: dict[str, Any]) -> str:
    (_, first), (_, last) = line["points"][0], line["points"][-1]
    return f"{line['name']} from {number(first)} to {number(last)}"


def training(drawn: Curves) -> str:
    """All training curves."""
    stages = {panel["stage"] for panel in drawn.panels}
    if not stages & {"pretraining", "finetuning"}:
        why = "No training curves: metrics.jsonl is not in the run folder."
        return absent("training", "Training", why)
    titles = {"pretraining": "Pretraining", "finetuning": "Fine-tuning"}
    body = [
        f"<h3>{name}</h3>{charts(drawn, stage)}"
        for stage, name in titles.items()
        if stage in stages
    ]
    lead = "By step; a dashed line is a step at which new pseudo-labels began to apply."
    return section("training", "Training", lead, *body)


_HEALTH = (
    "inertia", "iterations", "n_empty", "effective_clusters", "churn", "coverage", "nmi", "purity",
    "hungarian_accuracy", "mean_cosine", "age_mean", "seconds",
)  # fmt: skip

_ROUNDS_OPEN = 12


def health_table(rounds: list[PublishedRound]) -> str:
    """Every round with its health; a withheld one with its reason."""
    names = [name for name in _HEALTH if any(name in r.health for r in rounds)]
    rows = []
    for done in rounds:
        step = number(done.effective_step)
        state = "published" if done.ok else '<td style="color:var(--wrong)">withheld</td>'
        sizes = "–".join(
            number(done.health[n]) for n in ("size_min", "size_max") if n in done.health
        )
        values = [number(done.health.get(name, "–")) for name in names]
        rows.append([str(done.round), state, step, sizes, *values])
        if done.reason:
            rows.append([f'<td class="text" colspan="{len(names) + 4}">{text(done.reason)}</td>'])
    head = ["round", "", "from step", "sizes", *(_short(name) for name in names)]
    inner = f'<div class="card dense">{table(head, rows, "Health of each round")}</div>'
    if len(rounds) <= _ROUNDS_OPEN:
        return inner
    return f"<details><summary>All {len(rounds)} rounds</summary>{inner}</details>"


def _short(name: str) -> str:
    names = {"n_empty": "empty", "effective_clusters": "effective", "mean_cosine": "cosine"}
    names |= {"hungarian_accuracy": "Hungarian", "nmi": "NMI", "age_mean": "age"}
    return names.get(name, name)


def time(run: ReportData) -> str:
    """Where the run's time went: by phase, and within a step."""
    phases, steps = phase_seconds(run.results), step_seconds(run.metrics)
    if not phases and not steps:
        why = "No timings: neither results.json nor metrics.jsonl holds seconds."
        return absent("time", "Where the time went", why)
    cards = []
    if phases:
        cards.append(_stack("The run", phases))
    if steps:
        cards.append(_stack("One training step, on average", steps))
    lead = "Wall time. Waiting for data or for a round of clustering is time the trainer lost."
    if "clips_per_s" in run.metrics:
        rate = float(np.median(run.metrics["clips_per_s"].values_N))
        lead += f" Median throughput {number(rate)} clips/s."
    beside = (run.results.get("seconds") or {}).get("cluster")
    if beside:
        lead += f" Clustering took {duration(beside)}, beside pretraining."
    body = f'<div class="cards">{"".join(cards)}</div>'
    return section("time", "Where the time went", lead, body)


def _stack(title: str, parts: list[TimePart]) -> str:
    total = sum(part.seconds for part in parts)
    bars, rows = [], []
    for index, part in enumerate(parts):
        colour = f"var({_COLOURS[index % len(_COLOURS)]})"
        share = part.seconds / total if total else 0.0
        name = part.name.replace("_", " ")
        bars.append(
            f'<i style="width:{100 * share:.2f}%;background:{colour}" title="{text(name)}"></i>'
        )
        rows.append([
            f'<th scope="row"><i class="dot" style="background:{colour}"></i>{text(name)}</th>',
            duration(part.seconds), percent(share),
        ])  # fmt: skip
    inner = table(["part", "time", "share"], rows, title)
    return (
        f'<div class="card"><h3>{text(title)}: {duration(total)}</h3>'
        f'<div class="stack">{"".join(bars)}</div>{inner}</div>'
    )


def pins(run: ReportData, store: dict[str, str]) -> str:
    """All it takes to make this run again, and to know that a file is of this run."""
    mlflow = run.run.get("mlflow") or {}
    items = [
        ("config hash", run.run.get("config_hash") or run.results.get("config_hash")),
        ("started", run.run.get("started")),
        ("run folder", run.place.uri),
        *((f"store {key}", value) for key, value in store.items()),
        ("MLflow", mlflow.get("uri")),
        ("MLflow run", mlflow.get("run_id")),
    ]
    known = [(name, f"<code>{text(value)}</code>") for name, value in items if value]
    versions = [
        (name, f"<code>{text(value)}</code>")
        for name, value in sorted((run.run.get("versions") or {}).items())
    ]
    cards = [f'<div class="card"><h3>The run</h3>{definitions(known)}</div>']
    if versions:
        cards.append(f'<div class="card"><h3>Versions</h3>{definitions(versions)}</div>')
    body = [f'<div class="cards">{"".join(cards)}</div>']
    if run.artifacts:
        rows = [
            [text(a.name), f"{number(a.size)} bytes", f"<code>{a.sha256}</code>"]
            for a in run.artifacts
        ]
        body.append(
            f'<h3>Files</h3><div class="card">{table(["file", "size", "SHA-256"], rows)}</div>'
        )
    for title, content in (
        ("The resolved config (config.yaml)", run.config_yaml),
        ("All results (results.json)", json.dumps(run.results, indent=2) if run.results else ""),
    ):
        if content:
            body.append(f"<details><summary>{title}</summary><pre>{text(content)}</pre></details>")
    lead = "The same code, config, data version and seed give the same model on the same hardware."
    return section("pins", "What pins this run", lead, *body)
