"""write_results: the runs of an ablation to its tables, its figure and its MLflow run.

Knows nothing of how runs were made. Invariant: what is shown is read from what was measured, and
variants without a finished run are left out.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diccae.ablation.runs import TABLE, Finished, Plan
from diccae.run_folder import read_json, write_json
from pipeline.scratch import scratch_folder
from pipeline.storage import Location
from training.evaluation.paired import PairedDifference, contrasts, spread
from training.evaluation.variants import VARIANTS
from training.report.ablate import (
    Metrics,
    contrast_rows,
    draw,
    draw_response,
    markdown,
    note,
    values_of,
    variant_rows,
)
from training.tracking import mlflow_run as tracking
from training.tracking.client import RunHandle


def _without_nan(fields: dict[str, Any]) -> dict[str, Any]:
    """NaN, which strict JSON does not know, as None."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in fields.items()
    }


class Summary(NamedTuple):
    """An ablation as it is shown and as it is kept."""

    content: dict[str, Any]
    """Of ablation.json."""
    tables: list[tuple[list[str], list[list[str]]]]
    """Header and rows: variants, then differences."""
    note: str


def write_results(
    out: Location,
    plan: Plan,
    done: Sequence[Finished],
    record: dict[str, Any],
    failed: Mapping[str, str],
) -> Summary:
    """Write ablation.json, .md and .png into `out`, and hand them to MLflow.

    Args: failed: why, by run.
    """
    ran = {run.variant for run in done}
    names = [name for name in plan.variants if name in ran]
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    for run in done:
        found[run.variant][run.seed] = run.metrics
    values = values_of(found, plan.metric)
    differences = contrasts(values, [name for name in names if name not in VARIANTS])
    n_test = int(done[0].metrics["n_test"])
    shown = {
        name: {**plan.variants[name]._asdict(), **_without_nan(spread(values[name])._asdict())}
        for name in names
    }
    content = read_json(out, TABLE) | {
        "n_test": n_test,
        "variants": shown,
        "contrasts": [_without_nan(difference._asdict()) for difference in differences],
        "runs": [run._asdict() for run in done],
        "failed": dict(failed),
    }
    write_json(out, TABLE, content)
    page = markdown(found, plan.metric, differences, plan.variants, record, n_test)
    out.write_bytes("ablation.md", page.encode())
    files = _draw(found, plan, differences, out)
    means = {f"mean/{name}": spread(by_seed).mean for name, by_seed in values.items()}
    points = {f"difference/{d.variant}-{d.reference}": d.mean for d in differences}
    handle = RunHandle(record["mlflow"]["uri"], record["mlflow"]["run_id"], out.uri)
    _track(handle, means | points, files)
    tables = [variant_rows(found, plan.metric), contrast_rows(differences)]
    return Summary(content, tables, note(differences, n_test, record["split"]))


def _draw(
    found: Metrics, plan: Plan, differences: Sequence[PairedDifference], out: Location
) -> list[str]:
    """Write the figures. Returns: URIs of all files of the ablation."""
    with out.written("ablation.png") as picture:
        draw(found, plan.metric, differences, picture)
    files = [out.uri_of(f"ablation.{kind}") for kind in ("json", "md", "png")]
    with scratch_folder() as scratch:
        picture = Path(scratch) / "response.png"
        if draw_response(found, plan.metric, plan.variants, picture):
            out.write_bytes(picture.name, picture.read_bytes())
            files.append(out.uri_of(picture.name))
    return files


def _track(handle: RunHandle, numbers: dict[str, float], files: Sequence[str]) -> None:
    if handle.run_id:
        tracking.log_results(handle, numbers)
        tracking.log_artifacts(handle, files)
    tracking.finish(handle, "FINISHED")
