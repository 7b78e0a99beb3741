"""All that is said to a run in MLflow, but its curves while a stage goes on.

Knows nothing of what is trained. Invariant: no call raises because of MLflow; what that missed when
a run was made waits in the run folder.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.passwords import without_passwords
from pipeline.storage import Location, fetched
from training.cluster_config import TrackingConfig
from training.tracking.client import (
    RunHandle,
    legal_name,
    mlflow_client,
    never_fatal,
    uploading,
)
from training.tracking.copier import MetricsCopier
from training.tracking.destination import destination
from training.tracking.tracker import FINETUNE_METRICS, METRICS

_MAX_PARAMS = 100
_PENDING = "mlflow-pending.json"
"""Of a run folder: what MLflow was to be told when it was away, and how the last stage ended."""


def create_run(
    config: TrackingConfig,
    out: str,
    params: dict[str, Any],
    tags: dict[str, str],
    dataset: dict[str, Any],
) -> RunHandle:
    """Make the MLflow run of a training run: params once, tags, and the data it reads.

    Args: params: nested dicts are flattened to dotted names. tags: `mlflow.runName` names the run.
        dataset: uri, version and digest of the pinned feature store.
    Returns: a handle; with an empty run_id if MLflow does not answer now, or there is none.
    """
    where = destination(config, out)
    uri = where.uri
    if not uri:
        return RunHandle("", "", str(out))
    if Location(out).is_local:
        Path(out).mkdir(parents=True, exist_ok=True)  # SQLite makes none.
    request: dict[str, Any] = {
        "experiment": where.experiment,
        "params": _as_text(params),
        "tags": {key: str(value) for key, value in tags.items()},
        "dataset": dataset,
        "started_ms": int(time.time() * 1000),
        "run_id": "",
    }
    is_made = _request_run(uri, request)
    if not is_made:
        Location(out).write_bytes(_PENDING, json.dumps(request).encode())
    return RunHandle(uri, request["run_id"] if is_made else "", str(out))


@never_fatal("create the run: what it is told waits in the run folder for a stage's start or end")
def _request_run(uri: str, request: dict[str, Any]) -> bool:
    """Make the run; True if MLflow has it with its params.

    Args: request: gets the `run_id` as soon as there is one: where the rest fails, the next try
        goes on with that run, and none is left behind.
    """
    client = mlflow_client(uri)
    if not request.get("run_id"):
        run = client.create_run(
            _experiment_id(client, uri, request["experiment"]),
            start_time=request["started_ms"],
            tags=request["tags"] | _store_tags(request["dataset"]),
            run_name=request["tags"].get("mlflow.runName"),
        )
        request["run_id"] = run.info.run_id
    _log_params(client, request["run_id"], request["params"])
    _log_dataset(client, request["run_id"], request["dataset"])
    return True


def _log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    each = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(each), _MAX_PARAMS):
        client.log_batch(run_id, params=each[start : start + _MAX_PARAMS])


def _experiment_id(client: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            created: str = client.create_experiment(name, artifact_location=_artifacts_of(uri))
            return created
        except MlflowException:  # another run made it just now
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    experiment_id: str = found.experiment_id
    return experiment_id


def _artifacts_of(uri: str) -> str | None:
    """Artifacts of an SQLite file lie beside it; MLflow's own default is the current folder."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def _store_tags(dataset: dict[str, Any]) -> dict[str, str]:
    return {f"store.{key}": value for key, value in _store_of(dataset).items()}


def _store_of(dataset: dict[str, Any]) -> dict[str, str]:
    return {key: str(dataset[key]) for key in ("uri", "version", "digest") if key in dataset}


@never_fatal("store what the run reads; its tags say it")
def _log_dataset(client: Any, run_id: str, dataset: dict[str, Any]) -> None:
    """As the run's input, which not every server keeps."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if not dataset:
        return
    store = _store_of(dataset)
    entity = Dataset(
        name=str(dataset.get("name", "feature-store")),
        digest=store.get("digest", "")[:36],  # MLflow's limit; the tag holds all of it
        source_type="diccae-store",
        source=json.dumps(store),
        profile=json.dumps({key: value for key, value in dataset.items() if key not in store}),
    )
    client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])


def flatten(params: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts as (dotted name, value)."""
    for key, value in params.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _as_text(params: dict[str, Any]) -> dict[str, str]:
    """As MLflow holds them, who may show them to more people than may read a run folder."""
    return {key: without_passwords(str(value)) for key, value in flatten(params)}


@never_fatal("store settings")
def log_settings(handle: RunHandle, params: dict[str, Any], tags: Mapping[str, str]) -> bool:
    """What a stage is done with; True if MLflow has it, also from before.

    MLflow never changes a param: where it holds another value, as of a run that an earlier version
    made, the value becomes a tag of the param's name.
    Args: params: nested dicts are flattened to dotted names.
    """
    from mlflow.entities import RunTag

    client, told = mlflow_client(handle.uri), _as_text(params)
    data = client.get_run(handle.run_id).data
    _log_params(client, handle.run_id, {k: v for k, v in told.items() if k not in data.params})
    held = {**data.params, **data.tags}
    changed = {k: v for k, v in told.items() if held.get(k, v) != v}
    changed |= {k: v for k, v in tags.items() if data.tags.get(k) != v}
    if changed:
        client.log_batch(handle.run_id, tags=[RunTag(k, v) for k, v in changed.items()])
    return True


@never_fatal("store results")
def log_results(
    handle: RunHandle, metrics: dict[str, float], measured_with: dict[str, Any] | None = None
) -> bool:
    """Final numbers of an evaluation, as metrics of the run without a curve; True if sent.

    Args: measured_with: tags, flattened to dotted names: no params, since numbers of another
        evaluation replace these.
    """
    from mlflow.entities import Metric, RunTag

    now_ms = int(time.time() * 1000)
    mlflow_client(handle.uri).log_batch(
        handle.run_id,
        metrics=[Metric(legal_name(key), value, now_ms, 0) for key, value in metrics.items()],
        tags=[RunTag(key, value) for key, value in _as_text(measured_with or {}).items()],
    )
    return True


@never_fatal("store artifacts")
def log_artifacts(handle: RunHandle, paths: Iterable[str | Path]) -> bool:
    """Copy files, and folders under their own name, to the run; True if all arrived.

    Args: paths: also URIs.
    """
    client = mlflow_client(handle.uri)
    for each in paths:
        with fetched(each) as path, uploading():
            if path.is_dir():
                client.log_artifacts(handle.run_id, str(path), artifact_path=path.name)
            else:
                client.log_artifact(handle.run_id, str(path))
    return True


@never_fatal("store a text")
def log_text(handle: RunHandle, name: str, text: str) -> bool:
    """Keep a text as a file of the run, without the passwords of URLs; True if it arrived."""
    mlflow_client(handle.uri).log_text(handle.run_id, without_passwords(text), name)
    return True


@never_fatal("mark the run as going on")
def begin(handle: RunHandle) -> bool:
    """A stage begins: the run goes on until `finish`, also one that an earlier stage ended.

    Returns: whether MLflow has it; None where it fails.
    """
    if handle.run_id:
        mlflow_client(handle.uri).update_run(handle.run_id, status="RUNNING")
    return bool(handle.run_id)


@never_fatal("end the run of a killed stage")
def settle(handle: RunHandle) -> None:
    """End a run as KILLED whose last stage was killed before it could say so.

    For a caller that holds the run folder: nobody else can be at work there.
    """
    if not handle.run_id:
        return
    client = mlflow_client(handle.uri)
    if client.get_run(handle.run_id).info.status == "RUNNING":
        client.set_terminated(handle.run_id, "KILLED")


def finish(handle: RunHandle, status: str = "FINISHED", timeout_s: float = 60.0) -> RunHandle:
    """Send what MLflow still lacks and end the run as FINISHED, FAILED or KILLED.

    Returns: the handle, with its run id if the run could only be created now.
    """
    if handle.run_id:
        _send_and_end(handle, status, timeout_s)
        return handle
    request = _missed_request(handle)
    if request is None:
        return handle
    Location(handle.out).write_bytes(_PENDING, json.dumps(request | {"status": status}).encode())
    return catch_up(handle, timeout_s)


def catch_up(handle: RunHandle, timeout_s: float = 60.0) -> RunHandle:
    """Make the run that MLflow missed when it began, with its curves until now, if it answers.

    Its end is that of the last stage; one that was killed before it could say so is KILLED.
    Returns: the handle, with its run id then.
    """
    request = _missed_request(handle)
    if request is None:
        return handle
    if not _request_run(handle.uri, request):
        if request.get("run_id"):
            Location(handle.out).write_bytes(_PENDING, json.dumps(request).encode())
        return handle
    Location(handle.out).remove(_PENDING)
    handle = handle._replace(run_id=request["run_id"])
    _send_and_end(handle, request.get("status", "KILLED"), timeout_s)
    return handle


def _missed_request(handle: RunHandle) -> dict[str, Any] | None:
    """What `create_run` left for a run that MLflow does not have yet."""
    if handle.run_id or not handle.uri or not handle.out:
        return None
    place = Location(handle.out)
    if not place.exists(_PENDING):
        return None
    request: dict[str, Any] = json.loads(place.read_bytes(_PENDING))
    return request


def _send_and_end(handle: RunHandle, status: str, timeout_s: float) -> None:
    if handle.out:
        place = Location(handle.out)
        for name in (METRICS, FINETUNE_METRICS):
            if place.exists(name) and not MetricsCopier(handle, place, name).drain(timeout_s):
                break  # Who does not answer is asked for the end alone, and no minute more.
    _end(handle, status)


@never_fatal("end the run")
def _end(handle: RunHandle, status: str) -> None:
    mlflow_client(handle.uri).set_terminated(handle.run_id, status)
