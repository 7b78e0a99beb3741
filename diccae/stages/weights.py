"""Published weights into a run folder, as if this project had trained them.

Knows nothing of their layouts. Invariant: what is imported evaluates and fine-tunes like a run.
"""

from typing import Any

from diccae.config import RunConfig
from diccae.run_folder import RunFolder
from diccae.stages.run_record import Say, open_run, pin_for, provenance, tracking_handle
from diccae.stages.statistics import settle
from training.data.rows import RowIndex
from training.errors import WeightsError
from training.model.classifier import Classifier
from training.model.encoder import Encoder
from training.model.make import input_shape
from training.tracking import mlflow_run as tracking
from training.weights.card import Applied
from training.weights.files import (
    WeightsReport,
    load_weights,
    read_class_names,
    save_classifier,
    save_encoder,
)


def import_weights(
    folder: RunFolder,
    config: RunConfig,
    store: str,
    uri: str,
    label_list: str | None,
    say: Say,
) -> WeightsReport:
    """Published weights as this run's `encoder/`, and with a label list as its `classifier/`.

    Raises: UsageError if they were trained with other statistics or features than config or store
        have; WeightsError if they do not fit, have no class head, or lack a class of the store.
    """
    data = pin_for(folder, config, store)
    train = data.train
    encoder, classifier, report = _filled(config, train, uri, label_list)
    config, statistics = settle(folder, config, data, say, uri, report.made_with)
    open_run(folder, config, store, say)
    folder.write_record(statistics=statistics)
    folder.check()
    made_from = provenance(folder, config) | {"weights": uri}
    saved = (train.classes, train.spec.model_dump(mode="json"), made_from)
    known: dict[str, Any] = {
        "statistics": config.data.statistics, "applied": Applied.of(config, report.space),
    }  # fmt: skip
    save_encoder(encoder, folder.place.uri_of("encoder"), *saved, **known)
    if classifier is not None:
        target = folder.place.uri_of("classifier")
        save_classifier(classifier, target, *saved, **known)
    handle = tracking.finish(tracking_handle(folder), "FINISHED")
    folder.write_record(mlflow={"uri": handle.uri, "run_id": handle.run_id})
    return report


def _filled(
    config: RunConfig, train: RowIndex, uri: str, label_list: str | None
) -> tuple[Encoder, Classifier | None, WeightsReport]:
    encoder = Encoder(config.encoder, input_shape(train.spec))
    if label_list is None:
        return encoder, None, load_weights(encoder, uri)
    tuning, n_classes = config.finetune, len(train.classes)
    multi_label = tuning.loss == "bce"
    classifier = Classifier(encoder, n_classes, tuning.mode, multi_label=multi_label)
    report = load_weights(classifier, uri, train.classes, read_class_names(label_list))
    if any(key.startswith("mlp_head.") for key in report.missing):
        raise WeightsError(f"{uri}: no class head in it; leave --classes out, then finetune")
    return encoder, classifier, report
