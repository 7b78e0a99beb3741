"""fit: any training loop on Ray Train, with checkpoints that survive its workers.

The edge to Ray Train v2: knows nothing of what is trained. Invariant: `ray.train.report` is called
at checkpoints only, by all workers at the same step; what a checkpoint holds loads with
weights_only=True.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from clustering import errors as of_clustering
from clustering.errors import BadVectors, ClusteringError, RoundTimeout
from pipeline.storage import Location, storage_failures_ignored
from training import errors as of_training
from training.attempt import UNHELD, Attempt
from training.cluster_config import ScaleConfig
from training.config import TrainingConfig
from training.data.order import WindowPlan
from training.data.reader import Reader
from training.errors import RunTaken, TrainingError
from training.loop.hooks import World
from training.model.cpu import use_cpu
from training.on_ray.checkpoints import last_state, report_state, settle
from training.on_ray.reader import RayReader
from training.on_ray.storage import arrow_filesystem
from training.run.checkpoints import KEPT
from training.run.edge import Edge, Written
from training.weights.files import absolute_uri

_CONTROLLER_POLL_S = "0.2"
_ASK_S = 10.0
"""How often the driver asks whether the run folder is still its own."""
_RAISED = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b")
_FINAL = (TrainingError, BadVectors, RoundTimeout)
"""What new workers could only come upon again. Of clustering not all is: rows that could not be
sent may find another actor."""

Loop = Callable[[dict[str, Any], Written], Any]
"""What a worker runs, over its settings and where the run is written down."""


def fit(
    loop: Loop, settings: dict[str, Any], written: Written, name: str, scale: ScaleConfig
) -> Any:
    """Run `loop` on the workers; goes on from the newest checkpoint under `name`.

    Args: written: its attempt is whose the workers are; they end for good when it has lost the
        folder.
    Returns: what rank 0 returned.
    Raises: the loop's own TrainingError, BadVectors or RoundTimeout; TrainingError for a worker
        that failed too often; KeyboardInterrupt.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    _quick_controller()
    place, attempt = written.out, written.attempt
    attempt.check()
    # By attempt: what the workers of an earlier one say too late must not end this one.
    said = f"failed/error-{attempt.number}.json"
    place.remove(said)  # Of an earlier stage.
    trainer = TorchTrainer(
        _told,
        train_loop_config=_Given(loop, settings, written, said)._asdict(),
        scaling_config=_scaling(scale),
        run_config=_storage(place, name, scale, attempt),
    )
    try:
        done = interruptible(trainer.fit, attempt)
    except ray.train.TrainingFailedError as error:
        attempt.check()
        raise _explained(error, place, said) from error
    if isinstance(done.return_value, _Failure):
        raise done.return_value.error
    _drop_uncounted(place.below(name), done.best_checkpoints or [], attempt)
    return done.return_value


def _drop_uncounted(folder: Location, counted: Sequence[tuple[Any, Any]], attempt: Attempt) -> None:
    """Remove checkpoints of workers that were killed or cut off before they had told of them.

    Ray removes those it was told of alone, so these would stay for ever.
    """
    names = {PurePosixPath(checkpoint.path).name for checkpoint, _ in counted}
    if not names:
        return
    with storage_failures_ignored():  # The run is done; room on storage is not worth its failure.
        attempt.check()
        # Ray's own list is a file beside them, whose name begins like theirs.
        for found in set(folder.entries()) - names - set(folder.files()):
            if found.startswith("checkpoint_"):
                folder.remove_tree(found)


def _storage(place: Location, name: str, scale: ScaleConfig, attempt: Attempt) -> Any:
    import ray.train

    return ray.train.RunConfig(
        name=name,
        storage_path=place.path,
        storage_filesystem=arrow_filesystem(place, attempt),
        failure_config=ray.train.FailureConfig(max_failures=scale.max_failures),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEPT),
    )


def _quick_controller() -> None:
    # A checkpoint counts once the controller has polled it; its default of 2 s would cost a small
    # run more than training.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _CONTROLLER_POLL_S)
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")


def for_workers(config: TrainingConfig) -> dict[str, Any]:
    """The training config as plain values, its local paths absolute."""
    plain = config.model_dump(mode="json", include=set(TrainingConfig.model_fields))
    init = plain["encoder"]["init"]
    plain["encoder"]["init"] = init and absolute_uri(init)
    return plain


def interruptible(call: Callable[[], Any], attempt: Attempt = UNHELD) -> Any:
    """The call's result. Ctrl-C raises KeyboardInterrupt here and leaves the call behind: in the
    main thread Ray Train would take the signal over and end the process with a code of its own.

    Raises: RunTaken, soon after the attempt has lost the folder: what is called may wait for nodes
        that the attempt after it has now.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    asked_at = time.monotonic()
    while thread.is_alive():
        thread.join(0.5)
        if time.monotonic() - asked_at >= _ASK_S:
            with storage_failures_ignored():  # Workers have no storage either; they wait.
                attempt.check()
            asked_at = time.monotonic()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _scaling(scale: ScaleConfig) -> Any:
    import ray.train

    workers: int | tuple[int, int] = scale.num_workers
    if scale.min_workers is not None:
        workers = (scale.min_workers, scale.num_workers)
    resources = {"CPU": scale.cpus_per_worker, **({"GPU": 1} if scale.use_gpu else {})}
    return ray.train.ScalingConfig(
        num_workers=workers, use_gpu=scale.use_gpu, resources_per_worker=resources
    )


class _Given(NamedTuple):
    """What a worker is started with."""

    loop: Loop
    settings: dict[str, Any]
    written: Written
    said: str
    """File of the run folder in which an error of `_FINAL` is written, for the workers that are
    started after it."""


def _told(config: dict[str, Any]) -> Any:
    """The loop, or the error that it ended with for good.

    Such an error is raised first, so that Ray ends the other workers, which may wait in a
    collective for this one until its timeout of 30 minutes. The workers that Ray then starts anew
    find it written down and return it: repeating the run could only fail again. That the run
    folder was taken over they see for themselves, and write nothing into it.
    """
    given = _Given(**config)
    place, attempt = given.written.out, given.written.attempt
    try:
        attempt.check()
    except RunTaken as error:
        return _Failure(error)
    if place.exists(given.said):
        return _Failure(_read_error(place, given.said))
    try:
        return given.loop(given.settings, given.written)
    except Exception as error:
        settle()  # Else the checkpoint on its way ended with this process.
        attempt.check()  # Rather this than what it may have led to, such as a lost actor.
        if isinstance(error, _FINAL):
            _write_error(place, given.said, error)
        raise


class _Failure(NamedTuple):
    error: Exception


def _write_error(place: Location, name: str, error: Exception) -> None:
    said = {"type": type(error).__name__, "message": str(error)}
    place.write_bytes(name, json.dumps(said).encode())


def _read_error(place: Location, name: str) -> TrainingError | ClusteringError:
    said = json.loads(place.read_bytes(name))
    kind = getattr(of_training, said["type"], None) or getattr(of_clustering, said["type"])
    error: TrainingError | ClusteringError = kind(said["message"])
    return error


def _explained(error: BaseException, place: Location, said: str) -> Exception:
    """What a worker wrote into the file `said`, else the line of its error and where all of it
    is."""
    if place.exists(said):  # The last failure that scale.max_failures allowed.
        return _read_error(place, said)
    name, text = "failed/traceback.txt", str(error)
    place.write_bytes(name, text.encode())
    lines = [line for line in text.splitlines() if _RAISED.match(line)]
    raised = lines[-1] if lines else type(error).__name__
    return TrainingError(
        f"training workers failed: {raised} (the whole traceback is in {place.uri_of(name)})"
    )


def this_world(scale: ScaleConfig) -> World:
    """This worker; sets its number of threads."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        use_cpu(scale.n_threads)
    return World(context.get_world_rank(), context.get_world_size(), device)


def this_edge(scale: ScaleConfig, written: Written, name: str) -> Edge:
    """This worker's surroundings; sets its number of threads.

    Args: name: folder of the run for its checkpoints, as `fit` was given it.
    """
    world, place = this_world(scale), written.out.below(name)

    def reader(windows: WindowPlan) -> Reader:
        return RayReader(windows, scale.reader_tasks, scale.reader_cpus, scale.cache)

    def save(state: dict[str, Any]) -> None:
        report_state(state, world.rank, place, written.attempt)

    return Edge(world, reader, last_state(), save, leaving_notice())


def leaving_notice() -> Callable[[], bool]:
    """A function that is true once for every node of this run that is about to be taken away.

    All workers call it equally often: it is a barrier.
    """
    import ray.train

    known: set[str] = set()

    def is_news() -> bool:
        info = ray.train.get_preemption_info()
        leaving = set(info.preempted_node_ids) - known if info is not None else set()
        known.update(leaving)
        return bool(leaving)

    return is_news
