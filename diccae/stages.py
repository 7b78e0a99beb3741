"""The stages of a run on its folder: pretrain, fine-tune, evaluate, report.

Composes pipeline, clustering and training; what the commands and the demo share.
Invariant: each stage reads what the stages before left in the folder, and leaves its own part of
`results.json`.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clustering.publish import load_round, rounds_at
from diccae.config import RunConfig
from diccae.errors import UsageError
from diccae.resources import check_fits, scale_note, start_ray, training_demands
from diccae.runs import RunFolder, watched
from pipeline.store import FeatureStore
from training import tracking
from training.batches import BatchPlan, RowIndex, clip_keys, index_rows
from training.classifier import Classifier
from training.encoder import Encoder
from training.errors import WeightsError
from training.metrics_copier import RunHandle
from training.pretrain import (
    WHOLE,
    Pinned,
    Span,
    check,
    input_shape,
    make_encoder,
    pin,
    pretrain,
)
from training.weights import (
    WeightsReport,
    by_part,
    load_weights,
    read_class_names,
    save_classifier,
    save_encoder,
)

Say = Callable[[str], None]


def run_pretrain(
    folder: RunFolder,
    config: RunConfig,
    store: str,
    say: Say,
    span: Span = WHOLE,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Pretrain into the folder, from its newest checkpoint if there is one.

    Args: tags: of the MLflow run, besides the usual ones.
    """
    data = _pin_for(folder, config, store)
    check(config, config.clustering, data)
    if config.encoder.init is not None and span.start is None and not folder.record:
        _say_what_weights_give(config, data, say)
    _remember(folder, config, store, data)
    n_clips = len(data.train)
    steps = BatchPlan.of(n_clips, config.pretrain.batch_size, config.data).steps(n_clips)
    total = steps * (span.until_epoch or config.pretrain.epochs)
    start_ray()
    labels = config.clustering if config.rounds.labels != "none" else None
    check_fits(training_demands(config, labels))
    handle = _tracking_run(folder, config, data, tags)
    scale_note(config.scale, say)
    say(
        f"pretrain  {len(data.train):,} clips of {store} version {data.snapshot.version}, "
        f"{total:,} steps of {config.pretrain.batch_size}, encoder {config.encoder.preset}"
    )
    started = time.monotonic()
    with watched(folder.path / "metrics.jsonl", total, "pretrain"):
        result = _with_status(
            folder,
            handle,
            lambda: pretrain(
                config,
                config.clustering,
                data,
                folder.path,
                handle,
                _provenance(folder, config),
                span,
            ),
        )
    before = folder.results.get("seconds", {}).get("pretrain", 0.0)
    metrics = result.get("metrics", {})
    folder.write_results(
        encoder=config.encoder.preset,
        n_train=len(data.train),
        config_hash=config.digest(),
        store=folder.record["store"],
        pseudo_labels=_pseudo_labels(folder.path, config),
        pretraining={name: metrics[name] for name in sorted(metrics) if "/" not in name},
        seconds={
            "pretrain": round(before + time.monotonic() - started, 2),
            "cluster": round(result.get("clustering_s", 0.0), 2),
        },
    )
    return result


def _say_what_weights_give(config: RunConfig, data: Pinned, say: Say) -> None:
    """Which keys of `encoder.init` fit, before the cluster is used.

    Raises: WeightsError if the file cannot be read or gives nothing.
    """
    assert config.encoder.init is not None
    report = load_weights(make_encoder(config, data.train.spec), config.encoder.init)
    say(f"weights   {config.encoder.init}, read as {report.layout}")
    for name in ("missing", "unexpected", "resized"):
        if keys := getattr(report, name):
            say(f"          {name}: {by_part(keys)}")


def _with_status(
    folder: RunFolder, handle: RunHandle, stage: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Run a stage and tell MLflow how it ended; an MLflow that was away gets the run now."""
    status = "FAILED"
    try:
        result = stage()
        status = "FINISHED"
        return result
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        handle = tracking.finish(handle, status)
        folder.write_record(mlflow={"uri": handle.uri, "run_id": handle.run_id})


def _pin_for(folder: RunFolder, config: RunConfig, store: str | None = None) -> Pinned:
    """The data of the run: the version it pinned when it started, else that of `store`.

    Raises: UsageError if the store is another one by now, or there is none to pin.
    """
    known = folder.record.get("store")
    if known is None:
        if store is None:
            raise UsageError(f"{folder.path}: no pretraining run in it; name the data with --store")
        return pin(store, config.data.version, config)
    data = pin(known["uri"], int(known["version"]), config)
    if data.snapshot.digest != known["digest"]:
        raise UsageError(
            f"{known['uri']} version {known['version']} holds other clips than this run read "
            f"(digest {data.snapshot.digest[:12]}, in run.json {known['digest'][:12]}): start the "
            "command in the folder the run was started in, or put its store back"
        )
    return data


def _remember(folder: RunFolder, config: RunConfig, store: str, data: Pinned) -> None:
    """Write down what the run reads, and keep that version from `store vacuum`."""
    if folder.record.get("store"):
        return
    snapshot = data.snapshot
    # With the version: folders of one name elsewhere must not let go of each other's.
    FeatureStore.open(store).pin(snapshot.version, f"run-{folder.path.name}-v{snapshot.version}")
    folder.write_record(
        store={"uri": store, "version": snapshot.version, "digest": snapshot.digest},
        config_hash=config.digest(),
    )


def _tracking_run(
    folder: RunFolder, config: RunConfig, data: Pinned, tags: Mapping[str, str] | None = None
) -> RunHandle:
    """The MLflow run of the folder: made once, the same after every restart."""
    known = folder.record.get("mlflow")
    if known:
        return RunHandle(known["uri"], known["run_id"], str(folder.path))
    handle = tracking.create_run(
        config.tracking,
        str(folder.path),
        config.model_dump(mode="json"),
        {"mlflow.runName": folder.path.name, "config_hash": config.digest(), **(tags or {})},
        folder.record["store"] | {"name": Path(str(data.snapshot.uri)).name},
    )
    folder.write_record(mlflow={"uri": handle.uri, "run_id": handle.run_id})
    return handle


def _handle(folder: RunFolder) -> RunHandle:
    known = folder.record.get("mlflow") or {"uri": "", "run_id": ""}
    return RunHandle(known["uri"], known["run_id"], str(folder.path))


def _provenance(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    return {
        "run": folder.record["name"],
        "store": folder.record["store"],
        "config_hash": config.digest(),
        "mlflow": folder.record.get("mlflow"),
    }


def _pseudo_labels(out: Path, config: RunConfig) -> dict[str, Any]:
    """Quality and stability of the rounds, from what clustering and training wrote down."""
    uri = str(out / "rounds")
    rounds = [load_round(uri, r) for r in rounds_at(uri)] if config.rounds.labels != "none" else []
    lines = list(tracking.read_metrics(out / "metrics.jsonl"))
    nmi = [line["clustering/nmi"] for line in lines if line.get("clustering/nmi") is not None]
    return {
        "k": config.clustering.k,
        "rounds": len(rounds),
        "nmi": nmi[-1] if nmi else None,
        "churn": [r.health.get("churn") for r in rounds],
    }


def open_run(folder: RunFolder, config: RunConfig, store: str | None) -> None:
    """Pin data and make the MLflow run of a folder that has none yet.

    Raises: UsageError without a store to pin.
    """
    if folder.record.get("store"):
        return
    data = _pin_for(folder, config, store)
    assert store is not None
    _remember(folder, config, store, data)
    _tracking_run(folder, config, data)


def import_weights(
    folder: RunFolder, config: RunConfig, store: str, uri: str, label_list: str | None
) -> WeightsReport:
    """Published weights as this run's `encoder/`, and with a label list as its `classifier/`.

    Raises: WeightsError if they do not fit, have no class head, or lack a class of the store.
    """
    train = _pin_for(folder, config, store).train
    encoder = Encoder(config.encoder, input_shape(train.spec))
    classifier = None
    if label_list is None:
        report = load_weights(encoder, uri)
    else:
        classifier = Classifier(encoder, len(train.classes), config.finetune.mode)
        report = load_weights(classifier, uri, train.classes, read_class_names(label_list))
        if any(key.startswith("mlp_head.") for key in report.missing):
            raise WeightsError(f"{uri}: no class head in it; leave --classes out, then finetune")
    open_run(folder, config, store)
    provenance = _provenance(folder, config) | {"weights": uri}
    saved = (train.classes, train.spec.model_dump(mode="json"), provenance)
    save_encoder(encoder, str(folder.path / "encoder"), *saved)
    if classifier is not None:
        save_classifier(classifier, str(folder.path / "classifier"), *saved)
    tracking.finish(_handle(folder), "FINISHED")
    return report


def run_finetune(folder: RunFolder, config: RunConfig, encoder: str | None, say: Say) -> None:
    """Fine-tune the folder's encoder (or another one) into `classifier/`."""
    from training.finetune import finetune

    data = _pin_for(folder, config)
    own = folder.path / "encoder"
    uri = encoder or (str(own) if (own / "encoder.json").exists() else None)
    steps = BatchPlan.of(len(data.train), config.finetune.batch_size, config.data).steps(
        len(data.train)
    )
    start_ray()
    check_fits(training_demands(config, None))
    say(f"finetune  {len(data.train.classes)} classes, from {uri or 'nothing'}")
    started = time.monotonic()
    handle = _handle(folder)
    with watched(folder.path / "finetune.jsonl", steps * config.finetune.epochs, "finetune"):
        _with_status(
            folder,
            handle,
            lambda: finetune(
                config, data.train, uri, folder.path, handle, _provenance(folder, config)
            ),
        )
    folder.write_results(seconds={"finetune": round(time.monotonic() - started, 2)})


def run_evaluate(folder: RunFolder, config: RunConfig, say: Say) -> dict[str, Any]:
    """Evaluate the folder's models on the test split into `results.json`."""
    from training.evaluate import evaluate

    data = _pin_for(folder, config)
    test = tested_rows(data, config)
    start_ray()
    say(f"evaluate  {len(test):,} {config.evaluate.split} clips")
    started = time.monotonic()
    found = evaluate(config, data.train, test, folder.path, _clusters(folder.path, test))
    seconds = {"evaluate": round(time.monotonic() - started, 2)}
    results = folder.write_results(**found, seconds=seconds, config_hash=config.digest())
    handle = _handle(folder)
    if handle.run_id:
        tracking.log_results(handle, dict(scalars(found)))
    return results


def tested_rows(data: Pinned, config: RunConfig) -> RowIndex:
    """The clips of `evaluate.split`. Raises: UsageError if none were kept for validation."""
    if config.evaluate.split == "test":
        return index_rows(data.snapshot, "test", data.train.classes)
    kept = data.validation
    labelled = None if kept is None else kept.take(kept.labels_N >= 0)
    if not labelled:
        raise UsageError(
            "evaluate.split = validation, but data.validation_frac = "
            f"{config.data.validation_frac} kept no labelled clip out of training; pretrain with "
            "--data.validation-frac 0.1, say"
        )
    return labelled


def _clusters(out: Path, test: RowIndex) -> dict[str, int]:
    """Last pseudo-label of the test clips; none, unless they were trained on."""
    uri = str(out / "rounds")
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


def run_report(folder: RunFolder, store: str | None) -> Path:
    """Write the page and hand it, the results and the encoder to MLflow."""
    from training.report.page import write_report

    page = write_report(folder.path, store)
    handle = _handle(folder)
    if handle.run_id:
        present = [
            folder.path / name
            for name in ("report.html", "results.json", "config.yaml", "encoder", "classifier")
        ]
        tracking.log_artifacts(handle, [path for path in present if path.exists()])
        name = folder.config().tracking.register_as
        if name and (folder.path / "encoder").exists():
            tracking.register_encoder(handle, folder.path / "encoder", name)
    return page
