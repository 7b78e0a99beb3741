"""The VGGSounder stage: the predictions of a run against all labels that are true of its clips.

Knows nothing of models: it reads `evaluation/predictions.parquet`. Invariant: results.json says
whose labels they are, how many of their clips were predicted, and which class a run cannot say.
"""

from collections.abc import Callable
from typing import Any

from diccae.errors import UsageError
from diccae.judging.predicted import predictions_of
from diccae.run_folder import RunFolder
from diccae.screen import table
from training.evaluation.predictions import Predictions
from training.vggsounder.exchange import write_pickle
from training.vggsounder.labels import read_labels
from training.vggsounder.noise import KINDS, split_errors
from training.vggsounder.scores import KS, Joined, join, measure

_MISSING = "vggsounder_missing.txt"
"""Of evaluation/: VGGSounder's clips that the run did not predict, one id a line."""


def run_vggsounder(
    folder: RunFolder, labels_file: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the run's predictions on VGGSounder's labels, into `results.json`."""
    predictions, labels = predictions_of(folder), read_labels(labels_file)
    joined = join(predictions, labels)
    missing = _missing(joined, predictions)
    found = {
        "labels": labels.source,
        "scorer": predictions.about.scorer,
        "n_clips": len(labels.clip_ids) - len(missing),
        "n_missing": len(missing),
        "missing_classes": joined.missing_classes,
        "scores": measure(joined),
        "label_noise": {
            stream: split.as_json() for stream, split in split_errors(predictions, labels).items()
        },
    }
    folder.check()
    place = folder.place.below("evaluation")
    place.write_bytes(_MISSING, "".join(f"{clip_id}\n" for clip_id in missing).encode())
    if missing:
        say(f"vggsounder  {len(missing):,} clips were not predicted: {place.uri_of(_MISSING)}")
    results = folder.write_results(vggsounder=found)
    if folder.record.get("mlflow"):
        # Ray, torch and MLflow take ten times as long to import as the metrics to compute.
        from diccae.stages.run_record import known_run, say_if_untracked
        from training.tracking import mlflow_run as tracking

        handle = known_run(folder, folder.config(), say)
        if handle.run_id:
            tracking.log_results(handle, dict(_logged(found)))
        say_if_untracked(handle, "VGGSounder's metrics are", say)
    return results


def _missing(joined: Joined, predictions: Predictions) -> list[str]:
    """Raises: UsageError if run and labels have no clip, or no class, in common."""
    labels = joined.labels
    missing = [i for i, row in zip(labels.clip_ids, joined.scored_T, strict=True) if row < 0]
    for what, own, theirs, n_missing in (
        ("clips", predictions.clip_ids, labels.clip_ids, len(missing)),
        ("classes", predictions.about.classes, labels.classes, len(joined.missing_classes)),
    ):
        if n_missing == len(theirs):
            raise UsageError(
                f"none of the run's {len(own):,} {what} (such as {own[0]!r}) is among VGGSounder's "
                f"{len(theirs):,} (such as {theirs[0]!r}): evaluate a run on VGGSound"
            )
    return missing


def _logged(found: dict[str, Any]) -> list[tuple[str, float]]:
    """The metrics on all clips, by name in MLflow."""
    return [
        (f"vggsounder/{modality}/{metric}", float(value))
        for modality, values in found["scores"]["all"].items()
        for metric, value in values.items()
    ]


def export_predictions(folder: RunFolder, file: str) -> dict[str, Any]:
    """Write the run's predictions as VGGSounder's benchmark reads them."""
    return write_pickle(file, predictions_of(folder))


def vggsounder_table(found: dict[str, Any]) -> str:
    """The metrics at 1 and 5 on all clips and without background music, and what errors are."""
    labels = found["labels"]
    lines = []
    shown = [f"{name}@{k}" for k in KS[:3:2] for name in ("hit_rate", "f1", "jaccard")]
    for subset in ("all", "no_background_music"):
        scores = dict(found["scores"][subset])
        mu = scores.pop("mu", {})
        rows = [
            [modality, f"{values['n_clips']:,}", *(f"{100 * values[name]:.1f}" for name in shown),
             f"{100 * mu[modality]:.1f}" if modality in mu else "-"]
            for modality, values in scores.items()
        ]  # fmt: skip
        lines += [table([f"VGGSounder, {subset.replace('_', ' ')}", "clips", *shown, "mu"], rows)]
    rows = [
        [stream, f"{100 * split['error']:.1f}",
         *(f"{100 * split['kinds'][kind]['share']:.1f}" for kind in KINDS)]
        for stream, split in found["label_noise"].items()
    ]  # fmt: skip
    lines += [table(["of the errors, %", "error", *(k.replace("_", " ") for k in KINDS)], rows)]
    lines.append(
        f"labels {labels['package']}, {labels['file']} ({labels['sha256'][:12]}): "
        f"{found['n_clips']:,} clips, {found['n_missing']:,} not predicted"
    )
    return "\n".join(lines)
