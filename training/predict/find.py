"""find_models: the saved models of a run folder, a model's folder, a URI or a registry's name.

Reads cards as plain JSON and imports no torch, so that decoders can start while that is imported.
Invariant: what is found has the features and normalisation it was trained with in its card.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import yaml
from pydantic import ValidationError

from pipeline.config import FeatureSpec
from pipeline.passwords import without_passwords
from pipeline.scratch import scratch_folder
from training.errors import TrainingError, WeightsError
from training.tracking.client import mlflow_client

_REGISTRY = ("models:/", "runs:/")


class Saved(NamedTuple):
    """Folders of saved models that belong together, and the features they take."""

    classifier: str | None
    encoder: str | None
    spec: FeatureSpec
    scratch: "tempfile.TemporaryDirectory[str] | None" = None
    """Where they were copied to; gone with this."""

    @property
    def main(self) -> str:
        """The classifier, else the encoder."""
        return self.classifier or self.encoder or ""


def find_models(uri: str, tracking_uri: str | None = None) -> Saved:
    """What there is at a place.

    Args: uri: a run folder, the folder of a model, either anywhere that fsspec reads, or a model of
        MLflow (models:/NAME@alias, models:/NAME/VERSION, runs:/ID/PATH); tracking_uri: the MLflow
        to ask, None: MLFLOW_TRACKING_URI.
    Raises: WeightsError if there is no model, or its card does not say its features; TrainingError
        if MLflow has no such model.
    """
    if uri.startswith(_REGISTRY):
        scratch = scratch_folder()
        folder = _downloaded(uri, tracking_uri, scratch.name)
        return _found(folder, uri)._replace(scratch=scratch)
    return _found(uri.rstrip("/"), uri)


def _found(folder: str, asked: str) -> Saved:
    places: dict[str, str] = {}
    cards: dict[str, dict[str, Any]] = {}
    for kind in ("classifier", "encoder"):
        for place in (f"{folder}/{kind}", folder):
            card = _card(f"{place}/{kind}.json")
            if card is not None:
                places[kind], cards[kind] = place, card
                break
    if not cards:
        raise WeightsError(
            f"{asked}: no model there: expected classifier/ or encoder/ (a run folder), or "
            "classifier.json or encoder.json (a model's folder); train one with diccae pretrain "
            "and finetune"
        )
    main = cards.get("classifier") or cards["encoder"]
    if not main.get("feature_spec") or not main.get("fbank_statistics"):
        raise WeightsError(
            f"{asked}: its card does not say which features it was trained on (feature_spec, "
            "fbank_statistics): import it with diccae weights import, or fine-tune it again"
        )
    try:
        spec = FeatureSpec.model_validate(main["feature_spec"])
    except ValidationError as error:
        raise WeightsError(
            f"{asked}: its feature_spec is not one of this version of diccae: {error}"
        ) from error
    return Saved(places.get("classifier"), places.get("encoder"), spec)


def _card(file: str) -> dict[str, Any] | None:
    try:
        filesystem, path = fsspec.core.url_to_fs(file)
        if not filesystem.exists(path):
            return None
        content = json.loads(filesystem.cat_file(path))
    except (ImportError, ValueError) as error:
        raise WeightsError(f"{file}: cannot be read as a model's card: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: no model's card, but a {type(content).__name__}")
    return content


def _downloaded(uri: str, tracking_uri: str | None, target: str) -> str:
    """The folder of the model inside a model that `diccae register` wrote."""
    # A bar for each of 200 small files would hide the answers.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    tracking_uri = tracking_uri or mlflow.get_tracking_uri()
    default = tracking_uri.removeprefix("sqlite:///")
    if default != tracking_uri and not os.path.exists(default):
        # MLflow would make the file, and find nothing in it.
        raise TrainingError(
            f"{uri}: {default}: no such MLflow database. Name the MLflow that has the model with "
            "--tracking-uri or MLFLOW_TRACKING_URI; a run's own is sqlite:///OUT/mlflow.db"
        )
    try:
        client = mlflow_client(tracking_uri)
        source = _source(uri, client) if uri.startswith("models:/") else uri
        folder = Path(
            download_artifacts(artifact_uri=source, dst_path=target, tracking_uri=tracking_uri)
        )
    except MlflowException as error:
        why = f"MLflow at {tracking_uri} does not give it: {' '.join(str(error).split())}"
        where = "name the one that has it with --tracking-uri or MLFLOW_TRACKING_URI"
        raise TrainingError(without_passwords(f"{uri}: {why}; {where}")) from error
    about = folder / "MLmodel"
    if not about.exists():
        return str(folder)
    flavour = yaml.safe_load(about.read_text())["flavors"]["python_function"]
    return str(folder / flavour["data"])


def _source(uri: str, client: Any) -> str:
    """Where a registered version's files are: MLflow's own lookup asks the process-wide registry.

    Args: uri: models:/NAME@ALIAS or models:/NAME/VERSION.
    """
    name, _, alias = uri.removeprefix("models:/").partition("@")
    if alias:
        version = client.get_model_version_by_alias(name, alias).version
    else:
        name, _, version = name.rpartition("/")
    source: str = client.get_model_version_download_uri(name, version)
    return source
