"""register: a saved model into an MLflow registry, as something that others can load and serve.

The edge of MLflow's registry: knows nothing of training or of how clips are answered. Invariant:
what is registered brings its code, its card and its requirements, so that it is loaded where none
of them is at hand.
"""

import base64
import contextlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import clustering
import pipeline
import training
from pipeline.scratch import scratch_folder
from pipeline.synth import write_clips
from training.config import STREAMS
from training.errors import TrainingError
from training.predict.find import find_models
from training.tracking.client import RunHandle, mlflow_client, never_fatal, one_line
from training.weights.files import read_card, saved_name
from training.weights.measured import read_measured

REQUIREMENTS = (
    *("mlflow", "torch", "torchaudio", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml"),
    *("av", "decord", "simplejpeg", "safetensors", "fsspec", "s3fs", "gcsfs", "psutil"),
)
"""What loading a model and answering imports; not Ray, faiss or what else training needs."""
_ONLY_ON = {"decord": "; platform_machine == 'x86_64'"}
_DESCRIPTION_CHARS = 4000
"""MLflow's database refuses 5,000."""


def register(handle: RunHandle, uri: str | Path, name: str, alias: str = "candidate") -> str:
    """Register a model as the next version of `name`, and point the alias at it.

    Args: uri: as `find_models`; of a run folder the classifier, or its encoder if it has none.
    Returns: the version.
    Raises: WeightsError if there is no model; TrainingError if its run is not in MLflow, or MLflow
        fails.
    """
    from mlflow.exceptions import MlflowException

    if not handle.run_id:
        raise TrainingError(
            f"{uri}: its run is not in MLflow yet (mlflow in run.json): the next stage sends it, "
            "such as diccae evaluate, with --tracking.uri URI if the run began without MLflow"
        )
    folder = find_models(str(uri)).main
    try:
        return _register(handle, folder, name, alias)
    except MlflowException as error:
        raise TrainingError(
            f"MLflow at {handle.shown} did not register {folder} as {name}: {one_line(error)}"
        ) from error


def _register(handle: RunHandle, folder: str, name: str, alias: str) -> str:
    from mlflow.exceptions import MlflowException

    kind = saved_name(folder)
    client = mlflow_client(handle.uri)
    with scratch_folder() as scratch:
        save_pyfunc(folder, Path(scratch) / kind)
        client.log_artifacts(handle.run_id, f"{scratch}/{kind}", artifact_path=f"pyfunc/{kind}")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(handle.run_id).info.artifact_uri}/pyfunc/{kind}"
    made = client.create_model_version(
        name,
        source,
        run_id=handle.run_id,
        description=_readme(folder)[:_DESCRIPTION_CHARS],
        tags=_tags(folder, kind),
    )
    client.set_registered_model_alias(name, alias, str(made.version))
    return str(made.version)


registered = never_fatal("register the model")(register)
"""The same for a run's end: a warning and None where MLflow fails."""


def save_pyfunc(folder: str, target: Path) -> None:
    """Write an MLflow model of a saved model's folder.

    Our packages go along as files (`code/`): they are in no package index, and a wheel of them
    would ask for all that training needs. `loader_module` instead of a Python object, so that
    nothing is pickled.
    """
    import mlflow.pyfunc
    import pandas as pd

    kind = saved_name(folder)
    with scratch_folder() as scratch:
        data = Path(scratch) / kind
        _fetch(folder, data)
        content = base64.b64encode(_clip(Path(scratch))).decode()
        mlflow.pyfunc.save_model(
            path=str(target),
            loader_module="training.predict.pyfunc",
            data_path=str(data),
            code_paths=[str(Path(p.__path__[0])) for p in (pipeline, clustering, training)],
            signature=_signature(kind),
            input_example=pd.DataFrame({"content": [content]}),
            pip_requirements=_requirements(),
        )


def _requirements() -> list[str]:
    """At the versions that are installed; what this machine lives without, another can, too."""
    found = []
    for name in REQUIREMENTS:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name}=={version(name)}{_ONLY_ON.get(name, '')}")
    return found


def _signature(kind: str) -> Any:
    """One column of any name, so that a plain list is taken, too; of the answers all columns."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    about = [(name, DataType.string) for name in ("clip", "reason", "detail")]
    if kind == "encoder":
        answers: list[Any] = [(stream, Array(DataType.double)) for stream in STREAMS]
    else:
        answers = [("class", DataType.string), ("p", DataType.double), ("margin", DataType.double)]
        answers += [(name, DataType.string) for name in ("confused_with", "decided_by")]
        for stream in STREAMS:
            answers += [(f"{stream}_class", DataType.string), (f"{stream}_p", DataType.double)]
    columns = [ColSpec(type_, name, required=False) for name, type_ in about + answers]
    return ModelSignature(Schema([ColSpec(DataType.string)]), Schema(columns))


def _clip(scratch: Path) -> bytes:
    """A clip of two seconds, 20 KB: an example that answers wherever it is sent."""
    write_clips(scratch / "example", n_train=1, n_test=0, seed=0, workers=1)
    [file] = (scratch / "example" / "videos").iterdir()
    return file.read_bytes()


def _fetch(folder: str, target: Path) -> None:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(folder.rstrip("/"))
    target.mkdir()
    for file in filesystem.ls(path, detail=False):
        if not filesystem.isdir(file):
            filesystem.get_file(file, str(target / file.rsplit("/", 1)[-1]))


def _readme(folder: str) -> str:
    """The text of the card, without the front matter."""
    import fsspec

    with fsspec.open(f"{folder.rstrip('/')}/README.md", "rt") as file:
        text: str = file.read()
    return text.split("---\n", 2)[-1].strip()


def _tags(folder: str, kind: str) -> dict[str, str]:
    """What a registry's search can ask for."""
    card, digest = read_card(folder, kind)
    measured = read_measured(folder, digest)
    store = card.provenance.get("store") or {}
    tags = {f"store.{key}": str(store[key]) for key in ("uri", "version", "digest") if key in store}
    tags |= {"sha256": digest, "kind": kind}
    for stream, value in (measured.results.get("top1", {}) if measured else {}).items():
        tags[f"top1.{stream}"] = f"{value:.4f}"
    return tags
