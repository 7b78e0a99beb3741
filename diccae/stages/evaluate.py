"""The evaluation stage: the models of a run folder to the numbers of `results.json`.

Knows nothing of how they are computed. Invariant: test clips are read here and nowhere before.
"""

import time
from collections.abc import Mapping
from typing import Any

from clustering.rounds.files import load_round, rounds_at
from diccae.config import RunConfig
from diccae.errors import UsageError
from diccae.run_folder import RunFolder
from diccae.stages.backend import ON_RAY, Backend
from diccae.stages.run_record import Say, pin_for, say_if_untracked
from diccae.stages.statistics import settle
from training.data.rows import RowIndex, clip_keys, index_rows, with_labels
from training.data.validation import groups_of
from training.evaluation.class_confusions import class_confusions
from training.evaluation.metrics import names, present
from training.evaluation.predictions import FILE as PREDICTIONS
from training.evaluation.predictions import read_predictions
from training.evaluation.results import read_confusion
from training.on_ray.evaluate import applied_by, evaluate
from training.run.pinned import Pinned
from training.tracking import mlflow_run as tracking
from training.weights.beside import write_readme
from training.weights.files import read_card
from training.weights.measured import Measured, write_measured

_VGGSOUNDER = "vggsounder"
"""Of results.json: what `diccae.judging.vggsounder` makes of the predictions."""


def run_evaluate(
    folder: RunFolder, config: RunConfig, say: Say, *, backend: Backend = ON_RAY
) -> dict[str, Any]:
    """Evaluate the folder's models on the test split into `results.json`."""
    data = pin_for(folder, config)
    test = tested_rows(data, config)
    config_hash = config.digest()
    config, _ = settle(folder, config, data, say)
    backend.ready_to_apply({"--store": data.snapshot.uri}, folder.uri, config.scale)
    say(f"evaluate  {len(test):,} {config.evaluate.split} clips")
    started = time.monotonic()
    clusters = _clusters(folder.place.uri_of("rounds"), test)
    handle = backend.attach(folder, config, data, say)
    tracking.settle(handle)
    with backend.watched_nodes(folder.attempt, handle, measure=False):
        evaluation = evaluate(
            config,
            data.train,
            test,
            folder.place,
            clusters,
            groups=_groups(data, config),
            config_hash=config_hash,
            apply=backend.apply,
            may_write=folder.check,
        )
    found = evaluation.as_json()
    tell_the_classifier(folder, config, found)
    seconds = {"evaluate": round(time.monotonic() - started, 2)}
    about = {"seconds": seconds, "config_hash": config.digest()}
    results = folder.write_results(without=_outdated(folder, found, say), **found, **about)
    if handle.run_id:
        folder.check()
        settings = config.model_dump(mode="json", include={"evaluate"})
        used = settings | {"config_hash": config.digest()} | folder.attempt.tags
        tracking.log_results(handle, dict(scalars(found)), used)
    say_if_untracked(handle, "results are", say)
    return results


def _outdated(folder: RunFolder, found: Mapping[str, Any], say: Say) -> set[str]:
    """What results.json has of an evaluation before and this one did not measure: it is of other
    predictions, and beside these numbers would be taken for theirs."""
    measured = {*names(with_classifier=True), _VGGSOUNDER}
    outdated = (measured & folder.results.keys()) - found.keys()
    if _VGGSOUNDER in outdated:
        what = "its numbers were of the predictions before"
        say(f"vggsounder  {what}: evaluate --reuse --vggsounder measures them again")
    return outdated


def tell_the_classifier(folder: RunFolder, config: RunConfig, found: Mapping[str, Any]) -> None:
    """Beside the classifier: what it is worth and what it confuses, for predictions and its card.

    Args: found: `Evaluation.as_json`.
    """
    uri = folder.place.uri_of("classifier")
    if not folder.place.exists("classifier/classifier.json"):
        return
    with folder.place.fetched("evaluation/confusion.npz") as file:
        confusion = read_confusion(file)
    predictions = read_predictions(folder.place.uri_of(f"evaluation/{PREDICTIONS}"))
    folder.check()
    measured = Measured(
        sha256=read_card(uri, "classifier")[1],
        split=found["split"],
        n_clips=found["n_test"],
        store=folder.record["store"],
        results={m.name: found[m.name] for m in present(found) if m.needs == "classifier"},
        applied=applied_by(config, folder.place.uri_of("encoder"))._asdict(),
        confusions=class_confusions(confusion, predictions),
    )
    write_measured(uri, measured)
    write_readme(uri, "classifier")


def tested_rows(data: Pinned, config: RunConfig) -> RowIndex:
    """The labelled clips of `evaluate.split`.

    Raises: UsageError if none were kept for validation; TrainingError without labels to test or to
    train the probes on.
    """
    with_labels(data.train, "evaluate (its probes learn from the train split)")
    if config.evaluate.split == "test":
        return with_labels(index_rows(data.snapshot, "test", data.train.classes), "evaluate")
    kept = data.validation
    labelled = None if kept is None else kept.take(kept.labels_N >= 0)
    if not labelled:
        raise UsageError(
            "evaluate.split = validation, but data.validation_frac = "
            f"{config.data.validation_frac} kept no labelled clip out of training; pretrain with "
            "--data.validation-frac 0.1, say"
        )
    return labelled


def _groups(data: Pinned, config: RunConfig) -> dict[str, str]:
    """The recording each clip was cut from: clips of one are not independent."""
    split = "test" if config.evaluate.split == "test" else "train"
    clip_ids = data.snapshot.rows(split)["clip_id"].to_pylist()
    return dict(zip(clip_ids, groups_of(data.snapshot, split).tolist(), strict=True))


def _clusters(uri: str, test: RowIndex) -> dict[str, int]:
    """Last pseudo-label of the test clips in the rounds at `uri`; none, unless they were trained
    on."""
    rounds = rounds_at(uri)
    if not rounds:
        return {}
    last = load_round(uri, rounds[-1])
    if not last.ok:
        return {}
    labels = last.heads[0].lookup(clip_keys(test.clip_ids_N.tolist()))
    return dict(zip(test.clip_ids_N.tolist(), labels.tolist(), strict=True))


def scalars(found: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Numbers of nested results by their name in MLflow, such as `probe/audio`."""
    out: list[tuple[str, float]] = []
    for name, value in found.items():
        if isinstance(value, dict):
            out += scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            out.append((f"{prefix}{name}", float(value)))
    return out
