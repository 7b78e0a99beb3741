"""The sections of a report that are numbers: results, curves, time, and what pins the run.

Knows nothing of frames or of the feature store. Invariant: a number shown stands in the run folder.
"""

import json
import math
from typing import Any

from clustering.rounds.protocol import PublishedRound
from training.config import STREAMS
from training.evaluation import metrics
from training.evaluation.metrics import Grid, Metric
from training.report.curves import Panel, Series, TimePart, panels, phase_seconds, step_seconds
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
        f'<div class="tile{" main" * main}"><b>{value}</b><span>{text(name)}</span></div>'
        for name, value, main in shown
    )
    return f'<div class="tiles">{inner}</div>'


def results(run: ReportData) -> str:
    """What was measured: by stream in one table, the rest in tables of their own."""
    found = run.results
    measured = metrics.present(found)
    if not measured:
        return absent("results", "Results", "No results: results.json holds no accuracy.")
    by_stream = [metric for metric in measured if metric.grid is None]
    tables = [_stream_table(found, by_stream)] if by_stream else []
    tables += [
        f"<h4>{text(metric.title)}</h4>{_grid_table(metric.grid, found[metric.name])}"
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
    return table(["stream", *(metric.title for metric in measured)], rows)


def _grid_table(grid: Grid, values: dict[str, Any]) -> str:
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
    return table([among, *(title for _, title in columns)], rows)


def curve_panels(run: ReportData) -> list[dict[str, Any]]:
    """What the script draws: curves of each stage by its steps, then those of rounds by round."""
    stages = {
        "pretraining": panels(run.metrics),
        "finetuning": panels(run.finetuning),
        "rounds": _round_panels(run.rounds),
    }
    return [_panel(panel, stage) for stage, found in stages.items() for panel in found]


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


def _round_panels(rounds: list[PublishedRound]) -> list[Panel]:
    found = []
    for title, names in _ROUND_PANELS:
        series = [
            Series(name, [(r.round, r.health[name]) for r in rounds if _has(r, name)])
            for name in names
        ]
        known = [line for line in series if line.points]
        if known and len(rounds) > 1:
            found.append(Panel(title, known))
    return found


def _has(done: PublishedRound, name: str) -> bool:
    return math.isfinite(done.health.get(name, math.nan))


def charts(drawn: list[dict[str, Any]], stage: str) -> str:
    """Places for the charts of one stage, with their legends."""
    boxes = [_chart(i, panel) for i, panel in enumerate(drawn) if panel["stage"] == stage]
    return f'<div class="cards">{"".join(boxes)}</div>'


def _chart(index: int, panel: dict[str, Any]) -> str:
    series = panel["series"]
    legend = "".join(
        f'<span><i style="background:var({line["colour"]})"></i>{text(line["name"])}</span>'
        for line in series
    )
    wide = " wide" if len(series) > 3 else ""
    label = f"{panel['title']}: {', '.join(line['name'] for line in series)}"
    return (
        f'<div class="card chart{wide}" ><h4>{text(panel["title"])}</h4>'
        f'<div class="legend">{legend}</div>'
        f'<div data-panel="{index}"><svg role="img" aria-label="{text(label)}"></svg></div></div>'
    )


def training(drawn: list[dict[str, Any]]) -> str:
    """All training curves."""
    stages = {panel["stage"] for panel in drawn}
    if not stages & {"pretraining", "finetuning"}:
        why = "No training curves: metrics.jsonl is not in the run folder."
        return absent("training", "Training", why)
    body = [charts(drawn, "pretraining")]
    if "finetuning" in stages:
        body = [f"<h3>Pretraining</h3>{body[0]}"] if "pretraining" in stages else []
        body.append(f"<h3>Fine-tuning</h3>{charts(drawn, 'finetuning')}")
    lead = "By step; a dashed line is a step at which new pseudo-labels began to apply."
    return section("training", "Training", lead, *body)


_HEALTH = (
    "inertia", "iterations", "n_empty", "effective_clusters", "churn", "coverage", "nmi", "purity",
    "hungarian_accuracy", "mean_cosine", "age_mean", "seconds",
)  # fmt: skip


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
    return f'<div class="card dense">{table(head, rows)}</div>'


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
    rate = [line["clips_per_s"] for line in run.metrics if line.get("clips_per_s")]
    lead = "Wall time. Waiting for data or for a round of clustering is time the trainer lost."
    if rate:
        lead += f" Median throughput {number(sorted(rate)[len(rate) // 2])} clips/s."
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
    return (
        f'<div class="card"><h4>{text(title)}: {duration(total)}</h4>'
        f'<div class="stack">{"".join(bars)}</div>{table(["", "time", "share"], rows)}</div>'
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
    cards = [f'<div class="card"><h4>The run</h4>{definitions(known)}</div>']
    if versions:
        cards.append(f'<div class="card"><h4>Versions</h4>{definitions(versions)}</div>')
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
