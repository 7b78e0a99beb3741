"""Who wants what on the cluster: starting or joining Ray, and refusing what cannot fit.

Invariant: a run whose actors, workers and readers do not fit is refused with a table before it
starts; Ray itself would wait for ever without a word.
"""

import atexit
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import psutil

from clustering.config import PoolGroups
from diccae.errors import ResourceError
from diccae.joining import await_answer, told_if_nobody_answers
from diccae.screen import say
from pipeline.cores import usable_cores
from training.cluster_config import ScaleConfig
from training.config import TrainingConfig

EMBEDDED_SPARE_CPUS = 2
"""Logical CPUs of an embedded cluster beyond the machine's cores: Ray's own light tasks and actors
ask for whole ones, and on a small machine would otherwise wait for ever."""

_NO_API_SERVER = "http://127.0.0.1:9"
"""Where an embedded cluster says its API server is: at a port that answers nothing."""

_EMBEDDED_ENV = {
    # Above four times this many workers Ray prints a notice to stdout; its own light actors
    # already are more than that on two cores.
    "RAY_worker_maximum_startup_concurrency": "16",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # Nobody preempts us.
    # Workers for a first job, one a CPU; training's and an ingest's have an environment of their
    # own and are started anew.
    "RAY_prestart_worker_first_driver": "0",
    # Nobody is shown the lines of Ray's logs, or what its dashboard would say of the machine.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",
    "REPORTER_UPDATE_INTERVAL_MS": "3600000",
}
"""Without what nobody uses inside one process: 5 s of a short run's minute on two cores."""

MAXIMA = "DICCAE_AUTOSCALING_GROUPS"
"""Variable in which a rendered manifest says what its cluster can grow to."""
_ROLE, _TRAIN = "diccae.io/role", "train"
"""Label of the nodes that train."""
_POLL_NODES_S = 2.0
_SAY_AGAIN_S = 60.0

_embedded: list[str] = []
"""Folders of clusters inside this process."""


def embedded_cores() -> int | None:
    """Cores of the cluster that `start_ray` starts in this process; None where it joins one."""
    return None if os.environ.get("RAY_ADDRESS") else usable_cores()


def is_alone(scale: ScaleConfig) -> bool:
    """Whether this process applies models itself: one worker of this machine would be another
    process with our torch in it, with the helpers of Ray Data beside it."""
    return embedded_cores() is not None and scale.num_workers == 1 and not scale.use_gpu


def job_id() -> str:
    """This process's job, as the job server that started it names it; empty if none did."""
    given = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return str((given.get("metadata") or {}).get("job_submission_id", ""))


def start_ray() -> None:
    """Join the cluster of this job (RAY_ADDRESS), or start one inside this process.

    Raises: ResourceError if no cluster answers at that address.
    """
    # Read at import: a thread that outlives an interrupted run would start another Ray.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray

    if ray.is_initialized():
        return
    _quiet()
    # Workers of an embedded cluster share the cores: one BLAS thread each unless told otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    quiet = {"log_to_driver": False, "configure_logging": False}
    cores = embedded_cores()
    if cores is None:
        _join(os.environ["RAY_ADDRESS"], quiet)
        return
    with _native_stderr_closed(), _sigterm_interrupts():
        os.environ |= _EMBEDDED_ENV | os.environ
        # It has none. Ray Train's guard of placement groups would wait for one for 12 s at the end
        # of each fit, or ask that of another cluster on this machine whether our run is alive.
        os.environ["RAY_API_SERVER_ADDRESS"] = _NO_API_SERVER
        folder = tempfile.mkdtemp(prefix="diccae-ray-", dir=_short_folder())
        _embedded.append(folder)
        atexit.register(_stop_embedded, folder)
        ray.init(
            address="local",
            num_cpus=cores + EMBEDDED_SPARE_CPUS,
            include_dashboard=False,
            _temp_dir=folder,
            **quiet,
        )


def _join(address: str, quiet: dict[str, bool]) -> None:
    import ray

    await_answer(address)
    with told_if_nobody_answers(address), _native_stderr_closed(), _sigterm_interrupts():
        ray.init(address="auto", **quiet)


def _stop_embedded(folder: str) -> None:
    """What a run leaves is in its own folder; Ray's logs and sockets go."""
    import ray

    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def leave(code: int) -> NoReturn:
    """End the process now, after an interrupt, and what it started.

    `ray.shutdown` beside threads of Ray Data that still work has ended it with a code of its own.
    Ray's two servers notice that their driver is gone; their helpers would stay for minutes.
    """
    below = psutil.Process().children(recursive=True) if _embedded else []
    helpers = [process for process in below if _name(process) not in ("raylet", "gcs_server")]
    for folder in _embedded:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    for process in helpers:
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(code)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""  # It is gone already.


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Ray's core announces its log level on file descriptor 2; errors come as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, as Kubernetes and `ray job stop` send it, is a Ctrl-C once Ray is up: what is done
    is kept. Ray's own handler, set by the body, would end the process from wherever it is."""
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _short_folder() -> str | None:
    """Ray's socket paths are limited to 107 bytes; a long TMPDIR would break them."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return folder if len(folder) < 40 else "/tmp"


def _quiet() -> None:
    """Errors of Ray still show; its progress bars and notices would bury ours."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Ray's core says at error level that an actor's arguments lie in the object store (ray#53727);
    # they do on purpose.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Demand(NamedTuple):
    """What one part of a run reserves."""

    part: str
    n: int
    cpus: float
    gpus: float
    keeps_off: bool = False
    """Whether nodes that are labelled for training are not for it: actors of a clustering pool
    (`FOREVER` in clustering.pool.compute)."""


class Node(NamedTuple):
    """What one machine of the cluster has."""

    cpus: float
    gpus: float
    trains: bool = False
    """Whether it is labelled for training, as a rendered manifest labels its group `train`."""


def training_demands(config: TrainingConfig, pool: PoolGroups | None) -> list[Demand]:
    """All that is on the cluster at once while training runs, with a pool where labels are made."""
    scale = config.scale
    workers = scale.min_workers or scale.num_workers
    demands = [
        Demand("training workers", workers, scale.cpus_per_worker, float(scale.use_gpu)),
        Demand("readers", workers * scale.reader_tasks, scale.reader_cpus, 0),
        Demand("Ray's own tasks", 1, 1.0, 0),
    ]
    return demands + [Demand(*group, keeps_off=True) for group in pool or ()]


def left_over(demands: list[Demand], nodes: list[Node]) -> list[Demand]:
    """What finds no place when the largest are placed first, each where least is left.

    One by one, because an actor lives on one node: four 4-CPU workers do not fit on eight nodes of
    2 CPUs. Ray places in the order of arrival, so what fails here would wait there, too. Where
    nodes are labelled, what keeps off some of them comes first, as pools start before workers.
    """
    free = list(nodes)
    labelled = any(node.trains for node in nodes)
    missing: list[Demand] = []
    first = sorted(demands, key=lambda d: (labelled and d.keeps_off, d.gpus, d.cpus), reverse=True)
    for demand in first:
        for placed in range(demand.n):
            fitting = [
                i
                for i, node in enumerate(free)
                if node.cpus + 1e-6 >= demand.cpus
                and node.gpus + 1e-6 >= demand.gpus
                and not (demand.keeps_off and node.trains)
            ]
            if not fitting:
                missing.append(demand._replace(n=demand.n - placed))
                break
            best = min(fitting, key=lambda i: (free[i].gpus, free[i].cpus))
            cpus, gpus = free[best].cpus - demand.cpus, free[best].gpus - demand.gpus
            free[best] = free[best]._replace(cpus=cpus, gpus=gpus)
    return missing


def inference_demands(scale: ScaleConfig) -> list[Demand]:
    """What applying a model to clips reserves: the actors, and the tasks that feed them."""
    return [
        Demand("inference actors", scale.num_workers, scale.cpus_per_worker, float(scale.use_gpu)),
        Demand("Ray's own tasks", 1, 1.0, 0),
    ]


def check_fits(
    demands: list[Demand], lower: str = "scale.num_workers, scale.cpus_per_worker or pool.n_actors"
) -> None:
    """Compare with the cluster Ray is connected to; where it can grow, wait until it has.

    Args: lower: the keys that make the run smaller, for the message.
    Raises: ResourceError with a table of who wants what, for what the cluster can never hold.
    """
    growing = nodes_at_most()
    nodes = growing or nodes_up()
    if missing := left_over(demands, nodes):
        raise ResourceError(_too_small(demands, nodes, missing, lower, bool(growing)))
    if growing:
        _wait_for_nodes(demands)


def nodes_up() -> list[Node]:
    """The nodes of the cluster Ray is connected to."""
    import ray

    return [
        Node(
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            node["Labels"].get(_ROLE) == _TRAIN,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def nodes_at_most() -> list[Node]:
    """The nodes that an autoscaler may start, as the rendered manifest says; none without one."""
    return nodes_of(json.loads(os.environ.get(MAXIMA) or "[]"))


def nodes_of(groups: list[dict[str, Any]]) -> list[Node]:
    """The nodes of groups that have as many as they can; a group of before 0.2 names no role."""
    return [
        Node(group["cpus"], group["gpus"], group.get("role") == _TRAIN)
        for group in groups
        for _ in range(group["nodes"])
    ]


def _wait_for_nodes(demands: list[Demand]) -> None:
    """Ask the autoscaler for what is missing, and wait: a group of min_nodes 0 has none yet."""
    if not left_over(demands, nodes_up()):
        return
    from ray.autoscaler.sdk import request_resources

    each = [demand for demand in demands for _ in range(demand.n)]
    bundles = [
        {"CPU": demand.cpus, **({"GPU": demand.gpus} if demand.gpus else {})} for demand in each
    ]
    # Else room on a node that trains would do, and none is started for what keeps off it.
    labels = [{_ROLE: f"!{_TRAIN}"} if demand.keeps_off else {} for demand in each]
    request_resources(bundles=bundles, bundle_label_selectors=labels)
    said, said_at = "", 0.0
    try:
        while missing := left_over(demands, nodes_up()):
            up = nodes_up()
            no_room = f"no room yet for {named(missing, up)}"
            line = f"waiting   for nodes: {no_room}; {len(up)} node(s) are up"
            if line != said or time.monotonic() - said_at > _SAY_AGAIN_S:
                say(line)
                said, said_at = line, time.monotonic()
            time.sleep(_POLL_NODES_S)
    finally:
        # What runs on a node keeps it; a request left standing would keep it after the run.
        request_resources(bundles=[])


def _too_small(
    demands: list[Demand], nodes: list[Node], missing: list[Demand], lower: str, grows: bool
) -> str:
    rows = "\n".join(
        f"  {d.part:<30} {d.n:>4} x {d.cpus:g} CPU" + (f", {d.gpus:g} GPU" if d.gpus else "")
        for d in demands
    )
    cpus, gpus = sum(d.n * d.cpus for d in demands), sum(d.n * d.gpus for d in demands)
    largest = max(nodes, key=lambda node: (node.gpus, node.cpus), default=Node(0, 0))
    has = "the cluster can grow to" if grows else "the cluster has"
    return (
        f"{has} {sum(n.cpus for n in nodes):g} CPUs and {sum(n.gpus for n in nodes):g} "
        f"GPUs on {len(nodes)} node(s), the largest {largest.cpus:g} and {largest.gpus:g}; this "
        f"run needs {cpus:g} and {gpus:g}:\n{rows}\n"
        f"No room for {named(missing, nodes)}. "
        f"Lower {lower}, or {'raise max_nodes of its groups' if grows else 'add nodes'}."
    )


def named(missing: list[Demand], nodes: list[Node]) -> str:
    """What found no place, and where only some of the nodes are for it."""
    off = " off the nodes that train" if any(node.trains for node in nodes) else ""
    return ", ".join(f"{d.n} of the {d.part}{off * d.keeps_off}" for d in missing)


def scale_note(scale: ScaleConfig, say: Callable[[str], None]) -> None:
    """Say when GPUs lie idle."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus and not scale.use_gpu:
        say(f"note: the cluster has {gpus:g} GPUs; --scale.use-gpu would use them")
