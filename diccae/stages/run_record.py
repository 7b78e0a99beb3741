"""What the stages of one run share: the store version it pinned, its MLflow run, its provenance.

Knows nothing of what a stage computes. Invariant: a run reads one version of one store for its
whole life, and is one MLflow run however often it is started; a classifier trained anew begins
another, which has the curves of pretraining, too.
"""

import hashlib
import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from diccae.config import RunConfig
from diccae.errors import UsageError
from diccae.run_folder import RunFolder
from pipeline.errors import StoreError
from pipeline.passwords import without_passwords
from pipeline.quality.leave_out import LeftOut
from pipeline.storage import is_storage_failure
from pipeline.store.store import FeatureStore, Snapshot
from pipeline.store.vacuumed import whole_snapshot
from training.run.pinned import Pinned, pin
from training.tracking import mlflow_run as tracking
from training.tracking.client import RunHandle
from training.tracking.copier import copied
from training.tracking.destination import destination, named

_log = logging.getLogger(__name__)
Say = Callable[[str], None]
_OF_LATER_STAGES = {"finetune", "evaluate"}
"""Sections that may change until their stage, and that MLflow is told then."""
_PARENT = "mlflow.parentRunId"
_LEFT_OUT = "left_out.parquet"
"""Of a run folder: clip_id and rule of the train clips it leaves out."""
_ID = "id"
"""Of a run folder on a disk: what tells it from one of the same path on another machine."""


def pin_for(folder: RunFolder, config: RunConfig, store: str | None = None) -> Pinned:
    """The data of the run: the version it pinned when it started, else that of `store`.

    Args: store: of a run that has a store, the place where that lies now, if it was moved.
    Raises: UsageError if the store is another one by now, or there is none to pin; StoreError if
        the version to pin was vacuumed.
    """
    known = folder.record.get("store")
    if known is None:
        if store is None:
            raise nothing_to_read(folder)
        whole_snapshot(FeatureStore.open(store), config.data.version)
        return pin(store, config.data.version, config)
    where = known["uri"] if store is None else _same_store(folder, known, store)
    data = pin(where, int(known["version"]), config, _left_out_before(folder))
    if data.snapshot.digest != known["digest"]:
        raise UsageError(
            f"{known['uri']} version {known['version']} holds other clips than this run read "
            f"(digest {data.snapshot.digest[:12]}, in run.json {known['digest'][:12]}): start the "
            "command in the folder the run was started in, or put its store back"
        )
    return data


def nothing_to_read(folder: RunFolder) -> UsageError:
    """What to say of a folder without a run where no store is named either."""
    return UsageError(f"{folder.uri}: no pretraining run in it; name the data with --store")


def _same_store(folder: RunFolder, known: Mapping[str, Any], store: str) -> str:
    """The URI of `store`, which is the one the run reads, or holds the same at its version.

    Raises: UsageError if it does not.
    """
    there, version = FeatureStore.open(store), int(known["version"])
    if there.uri == known["uri"]:
        return there.uri
    try:
        digest = there.snapshot(version).digest
        found = f"holds other clips in that version (digest {digest[:12]})"
    except StoreError as error:
        digest, found = "", f"does not have it: {error}"
    if digest != known["digest"]:
        raise UsageError(
            f"--store {store}: the run in {folder.uri} reads version {version} of {known['uri']} "
            f"(digest {known['digest'][:12]}), and this store {found}. Go on with --store "
            f"{known['uri']}, or name another --out for a run on this one"
        )
    return there.uri


def follow_store(folder: RunFolder, config: RunConfig, store: str) -> None:
    """Write down where the run's store lies now. Raises: UsageError if `store` is another one."""
    _write_down_place(folder, pin_for(folder, config, store).snapshot)


def _write_down_place(folder: RunFolder, snapshot: Snapshot) -> None:
    known = folder.record["store"]
    if snapshot.uri != known["uri"]:
        folder.check()
        folder.write_record(store=known | {"uri": snapshot.uri})
    keep_pinned(folder)


def keep_pinned(folder: RunFolder) -> None:
    """Have no vacuum take what the run reads. A folder that was moved, or copied, has a pin of
    another place: that one goes with what is there, or is there no more.

    A store that is not there is left to who reads it; of one that may only be read a warning says
    that a vacuum may take the run's version.
    """
    known = folder.record["store"]
    version = int(known["version"])
    name = _pin_name(folder, version)
    if not FeatureStore.exists(known["uri"]):
        return
    store = FeatureStore.open(known["uri"])
    if name in store.pins():
        return
    folder.check()
    try:
        store.pin(version, name, folder.uri)
    except Exception as error:
        if not is_storage_failure(error):
            raise
        _log.warning(
            "%s: version %d is not pinned for the run in %s, and a vacuum may take it: %s",
            store.uri, version, folder.uri, error,
        )  # fmt: skip


def _left_out_before(folder: RunFolder) -> LeftOut | None:
    """The clips the run left out when it began."""
    about = folder.record["store"].get("left_out")
    if about is None:
        return None
    with folder.place.fetched(_LEFT_OUT) as file:
        return LeftOut(pq.read_table(file), about["rules"])


def remember(
    folder: RunFolder,
    config: RunConfig,
    data: Pinned,
    statistics: Mapping[str, Any] | None = None,
) -> None:
    """Write down what the run reads, and where; keep that version from `store vacuum`.

    Args: statistics: what its fbanks are normalised with, if that is known yet.
    """
    if folder.record.get("store"):
        _write_down_place(folder, data.snapshot)
        return
    folder.check()
    snapshot = data.snapshot
    # The whole path: the next stage may be started in another folder.
    pinned: dict[str, Any] = {
        "uri": snapshot.uri, "version": snapshot.version, "digest": snapshot.digest,
    }  # fmt: skip
    if data.left_out is not None:
        # Which clips, not only which rules: a later look at the store must not change the run.
        with folder.place.written(_LEFT_OUT) as file:
            pq.write_table(data.left_out.clips, file)
        pinned["left_out"] = data.left_out.about()
    _give_id(folder)
    snapshot_pin = _pin_name(folder, snapshot.version)
    FeatureStore.open(snapshot.uri).pin(snapshot.version, snapshot_pin, folder.uri)
    folder.write_record(
        store=pinned,
        config_hash=config.digest(),
        **({"statistics": dict(statistics)} if statistics else {}),
    )


def let_go(folder: RunFolder) -> None:
    """Let go of what the run reads, before the run is deleted."""
    known = folder.record.get("store")
    if known and FeatureStore.exists(known["uri"]):
        folder.check()
        FeatureStore.open(known["uri"]).unpin(_pin_name(folder, int(known["version"])))


def _give_id(folder: RunFolder) -> None:
    """A bucket's URI is one place for all machines, the path of a disk is not."""
    if folder.place.is_local and not folder.place.exists(_ID):
        folder.place.write_bytes(_ID, uuid.uuid4().hex.encode())


def _pin_name(folder: RunFolder, version: int) -> str:
    """One for each folder and version: folders of one name elsewhere, and of one path on another
    machine, must not let go of each other's. The same for a start that died before it wrote
    run.json, and begins again; and for a run that was pinned before folders had an id."""
    own = folder.place.read_bytes(_ID).decode() if folder.place.exists(_ID) else ""
    place = hashlib.sha256(f"{folder.uri}{own}".encode()).hexdigest()[:8]
    return f"run-{folder.place.name}-v{version}-{place}"


def open_run(folder: RunFolder, config: RunConfig, store: str | None, say: Say) -> None:
    """Pin data and make the MLflow run of a folder that has none yet; of another one write down
    where its store lies now.

    Raises: UsageError without a store to pin, or with another one than the run's.
    """
    if folder.record.get("store"):
        if store is not None:
            follow_store(folder, config, store)
        else:
            keep_pinned(folder)
        return
    data = pin_for(folder, config, store)
    remember(folder, config, data)
    tracking_run(folder, config, data, say)


def tracking_run(
    folder: RunFolder,
    config: RunConfig,
    data: Pinned,
    say: Say,
    tags: Mapping[str, str] | None = None,
) -> RunHandle:
    """The MLflow run of the folder: made once, the same after every restart."""
    folder.check()
    known = known_run(folder, config, say)
    # Without a URI there was no MLflow, and this start may name one.
    if known.uri:
        return known
    tags = tags or {}
    if _PARENT not in tags:  # An ablation says it once, for all its runs.
        say(f"tracking  {destination(config.tracking, folder.uri)}")
    handle = tracking.create_run(
        config.tracking,
        folder.uri,
        _settings_of_begun(folder, config),
        {
            "mlflow.runName": folder.place.name,
            "config_hash": config.digest(),
            **folder.attempt.tags,
            **tags,
        },
        folder.record["store"] | {"name": Path(str(data.snapshot.uri)).name},
    )
    folder.write_record(mlflow={"uri": handle.uri, "run_id": handle.run_id})
    return handle


def _settings_of_begun(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """The config without the sections of stages that the folder has nothing of yet."""
    settings = config.model_dump(mode="json", exclude=_OF_LATER_STAGES)
    if folder.place.exists("classifier/classifier.json"):
        settings["finetune"] = folder.config().finetune.model_dump(mode="json")
    return settings


def attached_run(folder: RunFolder, config: RunConfig, data: Pinned, say: Say) -> RunHandle:
    """`known_run`; where the run began without MLflow and this start names one, it is made now,
    with the curves until now."""
    handle = known_run(folder, config, say)
    if handle.uri or not named(config.tracking)[0]:
        return handle
    handle = tracking.finish(tracking_run(folder, config, data, say))
    folder.write_record(mlflow={"uri": handle.uri, "run_id": handle.run_id})
    return handle


def known_run(folder: RunFolder, config: RunConfig, say: Say) -> RunHandle:
    """The folder's MLflow run for a stage that begins; one that MLflow missed is made now if it
    can be, where this start says. Without an id where there is none."""
    handle, (asked, by) = tracking_handle(folder), named(config.tracking)
    if handle.run_id:
        if asked and asked.rstrip("/") != handle.uri.rstrip("/"):
            other = without_passwords(asked)
            say(f"tracking  the run stays in MLflow at {handle.shown}; {by} is {other}")
        return handle
    if not handle.uri:
        return handle
    folder.check()
    handle = tracking.catch_up(handle._replace(uri=asked or handle.uri))
    folder.write_record(mlflow={"uri": handle.uri, "run_id": handle.run_id})
    return handle


def say_if_untracked(handle: RunHandle, what: str, say: Say) -> None:
    """For a stage that gives MLflow its results once: nothing sends these later."""
    if handle.run_id:
        return
    if handle.uri:
        why, then = f"MLflow at {handle.shown} lacks the run", "its next stage sends it there"
    else:
        why, then = "the run has no MLflow", "finetune or evaluate with --tracking.uri makes it one"
    say(f"tracking  {why}: {what} in the run folder alone; {then}")


def begin_another_tracking_run(folder: RunFolder, config: RunConfig, say: Say) -> None:
    """For a classifier that is trained anew: of a metric and a step MLflow keeps the point it has,
    so in the same run the curve would stay the old classifier's. It begins where the old one is,
    unless this start names another place."""
    old = folder.record.get("mlflow")
    if not old or not old["run_id"]:
        return
    folder.write_record(mlflow=None)
    if not named(config.tracking)[0]:
        stays = config.tracking.model_copy(update={"uri": old["uri"]})
        config = config.model_copy(update={"tracking": stays})
    again = {"fine_tuned_again_after": old["run_id"]}
    tracking_run(folder, config, pin_for(folder, config), say, again)


def tracking_handle(folder: RunFolder) -> RunHandle:
    """The folder's MLflow run; one without an id where none was made yet."""
    known = folder.record.get("mlflow") or {"uri": "", "run_id": ""}
    return RunHandle(known["uri"], known["run_id"], folder.uri)


def provenance(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """What a saved model says of where it comes from."""
    return {
        "run": folder.record["name"],
        "store": folder.record["store"],
        "config_hash": config.digest(),
        "mlflow": folder.record.get("mlflow"),
    }


def with_status(
    folder: RunFolder,
    handle: RunHandle,
    config: RunConfig,
    stage: Callable[[], dict[str, Any]],
    lines: str,
    section: str | None = None,
) -> dict[str, Any]:
    """Run a stage and tell MLflow that it runs, with what, its curves, and how it ended; an MLflow
    that was away gets the run now.

    A start that lost the folder tells nothing: the run is that of the one which holds it.
    Args: lines: file of the folder with the stage's metrics. section: of the config, which no
        stage before this one has used.
    """
    folder.check()
    status, told = "FAILED", False
    try:
        told = bool(tracking.begin(handle)) and _tell_settings(folder, handle, config, section)
        with copied(handle, folder.place, lines, folder.attempt):
            result = stage()
        status = "FINISHED"
        return result
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if folder.is_ours:
            handle = tracking.finish(handle, status)
            folder.write_record(mlflow={"uri": handle.uri, "run_id": handle.run_id})
            if handle.run_id and not told:  # MLflow was away when the stage began.
                _tell_settings(folder, handle, config, section)


def _tell_settings(
    folder: RunFolder, handle: RunHandle, config: RunConfig, section: str | None
) -> bool:
    """Returns: whether MLflow has them all."""
    # Of pretraining: what it goes on with other values of than it began with.
    sections = {section} if section else set(type(config).model_fields) - _OF_LATER_STAGES
    params = config.model_dump(mode="json", include=sections)
    has_params = tracking.log_settings(handle, params, {"config_hash": config.digest()})
    text = folder.place.read_bytes("config.yaml").decode()
    has_file = tracking.log_text(handle, "config.yaml", text)
    return bool(has_params and has_file)
