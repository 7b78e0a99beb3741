"""A run folder: what pins a run, its stages, and `results.json`.

Knows nothing of how a stage works. Invariants: a folder holds one run; the same command goes on
with it, another config is refused with the keys that differ; of several starts one writes at a
time, and one that was taken for dead writes nothing any more.
"""

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diccae import __version__
from diccae.config import (
    RunConfig,
    config_text,
    differing_keys,
    digests_of_text,
    parse_config,
    text_of,
)
from diccae.errors import UsageError
from diccae.resources import job_id
from diccae.screen import ProgressLine, clock
from pipeline.config import LEASE_STALE_S
from pipeline.errors import StoreLocked
from pipeline.storage import Location, storage_failures_ignored
from pipeline.store.lease import LEASE_FOLDER, Lease
from training.attempt import UNHELD, Attempt
from training.cluster_config import NOT_DECIDING
from training.errors import ConfigMismatch, TrainingError
from training.tracking.spool import PUBLISH_S

_LIBRARIES = (
    "torch",
    "torchaudio",
    "ray",
    "faiss-gpu",
    "faiss-cpu",
    "mlflow",
    "pyarrow",
    "deltalake",
)
_NOT_PINNED = (*NOT_DECIDING, "finetune.", "evaluate.", "features.")
"""What may change between the stages of a run; its features are pinned with the store."""


_LOOK_S = 0.5
"""How often a growing metrics file is looked at."""


def run_place(out: str | Path) -> Location:
    """Where `--out` is: a folder of this machine, a bucket, or whatever else fsspec opens.

    Raises: StoreError for a kind of place that there is not.
    """
    place = Location(out)
    # Workers run in other folders.
    return Location(Path(place.path).resolve()) if place.is_local else place


class RunFolder:
    """`<out>/` of a run."""

    def __init__(self, out: str | Path) -> None:
        self.place = run_place(out)
        self._lease: Lease | None = None
        self._is_passed_over = False

    @property
    def uri(self) -> str:
        """Of the folder; a local one's absolute path."""
        return self.place.uri

    @contextlib.contextmanager
    def held(self, purpose: str, stale_s: float = LEASE_STALE_S) -> Iterator[None]:
        """Be the one who writes into the folder. Commands of commands hold it once.

        Args: purpose: the command, for the message to others. stale_s: silence after which another
            start may take the folder over: `scale.lease_stale_s`, where the command has a config.
        Raises: StoreLocked (exit 4) while another start lives.
        """
        if self._lease is not None:
            yield
            return
        with Lease(self.place, stale_s, f"diccae {purpose}") as lease:
            self._lease = lease
            try:
                yield
            finally:
                self._lease = None

    @property
    def attempt(self) -> Attempt:
        """This start, for its workers; UNHELD outside of `held`."""
        if self._lease is None:
            return UNHELD
        return Attempt(self.uri, self._lease.generation, job_id())

    @property
    def is_ours(self) -> bool:
        """Whether no other start has taken the folder over."""
        try:
            self.check()
        except StoreLocked:
            return False
        return True

    def check(self) -> None:
        """Before each write. Raises: StoreLocked once another start has taken the folder over."""
        if self._lease is not None:
            self._lease.check()

    @contextlib.contextmanager
    def passed_over(self, fresh: bool) -> Iterator[None]:
        """Within, the run that is there counts as gone if `fresh`: what begins in its place is
        looked at as in an empty folder, before anything is deleted."""
        self._is_passed_over = fresh
        try:
            yield
        finally:
            self._is_passed_over = False

    @property
    def record(self) -> dict[str, Any]:
        """`run.json`, or empty."""
        return {} if self._is_passed_over else read_json(self.place, "run.json")

    @property
    def results(self) -> dict[str, Any]:
        """`results.json`, or empty."""
        return read_json(self.place, "results.json")

    def config(self) -> RunConfig:
        """The resolved config the run was started with.

        Raises: UsageError if this is no run folder.
        """
        config = config_in(self.place)
        if config is None:
            raise UsageError(
                f"{self.uri}: no config.yaml, so no run; start one with diccae pretrain --out"
            )
        return config

    def digests(self) -> list[str]:
        """Of its config: as this version has it, and as the version may have that wrote it down.

        They differ where keys were added since. Raises: UsageError if this is no run folder.
        """
        config = self.config()
        return [config.digest(), *digests_of_text(self.place.read_bytes("config.yaml").decode())]

    def changed_keys(self, config: RunConfig, free: tuple[str, ...] = NOT_DECIDING) -> list[str]:
        """Where another config differs from the run's own, as `key: its value -> the other's`.

        Args: free: sections, and single keys, that may.
        Raises: UsageError if this is no run folder.
        """
        own = self.config()
        differing = differing_keys(own, _with_statistics_of(own, config))
        return [line for line in differing if not line.startswith(free)]

    def open(self, config: RunConfig, fresh: bool, pretraining: bool = False) -> bool:
        """Take the folder for this run. Returns: whether a run is being taken up again.

        Args: pretraining: the fine-tuning settings of `config` are not what a classifier that may
            be there was made with.
        A folder whose run was refused before it started has no record and is free.
        Raises: ConfigMismatch naming the keys, if the folder holds a run of another config.
        """
        self.check()
        if fresh and self.record:
            self._clear()
        self.refuse_other(config)
        if self.record:
            config = _with_statistics_of(self.config(), config)
            config = self._with_settings_of_classifier(config) if pretraining else config
        self.place.write_bytes("config.yaml", config_text(config).encode())
        return bool(self.record)

    def refuse_other(self, config: RunConfig) -> None:
        """Raises: ConfigMismatch naming the keys, if the folder holds a run of another config."""
        keys = self.changed_keys(config, _NOT_PINNED) if self.record else []
        if keys:
            raise ConfigMismatch(
                f"{self.uri} holds a run of another config: {'; '.join(keys)}. Use the old config, "
                "another --out, or --fresh of pretrain or demo (this deletes the old run)."
            )

    def _clear(self) -> None:
        """Remove all but the lease: a start of before must go on to find that it lost it.

        What says that there is a run goes last: checkpoints without it would be gone on with.
        """
        for name in sorted(self.place.entries(), key=lambda name: name == "run.json"):
            if name != LEASE_FOLDER:
                self.place.remove_tree(name)

    def _with_settings_of_classifier(self, config: RunConfig) -> RunConfig:
        if not self.place.exists("classifier/classifier.json"):
            return config
        return config.model_copy(update={"finetune": self.config().finetune})

    def write_record(self, **fields: Any) -> None:
        """Merge fields into `run.json`, and which attempt did so."""
        self.check()
        if self.attempt.number:
            fields["attempt"] = self.attempt.number
            fields["job"] = job_id()
        record = {
            "name": self.place.name,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": _versions(),
            **self.record,
            **fields,
        }
        write_json(self.place, "run.json", record)

    def write_results(self, *, without: Collection[str] = (), **fields: Any) -> dict[str, Any]:
        """Merge fields into `results.json`; times of stages are kept beside each other.

        Args: without: fields of before that are not kept.
        """
        self.check()
        old = {name: value for name, value in self.results.items() if name not in without}
        seconds = {**old.get("seconds", {}), **fields.pop("seconds", {})}
        results = {**old, **fields, "seconds": seconds}
        write_json(self.place, "results.json", results)
        return results


def read_json(place: Location, name: str) -> dict[str, Any]:
    """The content of a JSON file; empty if there is none.

    Raises: TrainingError if it is damaged.
    """
    try:
        content = json.loads(place.read_bytes(name))
    except FileNotFoundError:
        return {}
    except ValueError as error:  # Not JSON, or not even text.
        raise _damaged(place, name, str(error)) from None
    if not isinstance(content, dict):
        raise _damaged(place, name, f"a {type(content).__name__}, expected an object")
    return content


def _damaged(place: Location, name: str, found: str) -> TrainingError:
    return TrainingError(
        f"{place.uri_of(name)}: damaged, no JSON as diccae writes it (found {found}); put a copy "
        "of it back, or start again in another --out"
    )


def write_json(place: Location, name: str, content: dict[str, Any]) -> None:
    """Replace a JSON file whole."""
    place.write_bytes(name, json.dumps(content, indent=1).encode())


def config_in(place: Location) -> RunConfig | None:
    """The config of the run in a folder, if there is one."""
    try:
        content = place.read_bytes("config.yaml")
    except FileNotFoundError:
        return None
    where = place.uri_of("config.yaml")
    return parse_config(text_of(content, where), where)


def _versions() -> dict[str, str]:
    """Of what decides results: faiss comes in one of two packages; code that was submitted to a
    cluster is installed in none."""
    found = {"diccae": __version__}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _with_statistics_of(old: RunConfig, new: RunConfig) -> RunConfig:
    """The new config, with the fbank statistics of the run's own where it leaves them open: until
    they were found in the store, each config named some."""
    if new.data.given_statistics is not None:
        return new
    same = {"fbank_mean": old.data.fbank_mean, "fbank_std": old.data.fbank_std}
    return new.model_copy(update={"data": new.data.model_copy(update=same)})


@contextlib.contextmanager
def watched(place: Location, name: str, total_steps: int, what: str) -> Iterator[None]:
    """Show the newest line of a metrics file while a stage runs."""
    every_s = _LOOK_S if place.appends else PUBLISH_S

    line, stop = ProgressLine(every_s=2.0), threading.Event()
    thread = threading.Thread(
        target=_watch,
        args=(lambda: _last_line(place, name), total_steps, what, line),
        kwargs={"stop": stop, "every_s": every_s},
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)
        line.close()


def _watch(
    newest_line: Callable[[], dict[str, Any] | None],
    total_steps: int,
    what: str,
    line: ProgressLine,
    *,
    stop: threading.Event,
    every_s: float,
) -> None:
    started, first_step, shown = time.monotonic(), None, -1
    while True:
        ending = stop.wait(every_s)
        newest = newest_line()
        step = int(newest.get("step", -1)) if newest else -1
        if newest and step != shown:
            if first_step is None or step < shown:
                first_step, started = step, time.monotonic()
            rate = (step - first_step) / max(1e-9, time.monotonic() - started)
            left = (total_steps - step) / rate if rate > 0 else None
            line.show(f"{what} {_describe(newest, total_steps)}  left {clock(left)}", now=ending)
            shown = step
        if ending:
            return


def _describe(metrics: dict[str, Any], total_steps: int) -> str:
    found = {name.removeprefix("finetune/"): value for name, value in metrics.items()}
    parts = [f"step {found['step']:,}/{total_steps:,}  epoch {found.get('epoch', 0):.2f}"]
    names = {
        "loss": "loss",
        "loss_instance": "InfoNCE",
        "accuracy": "accuracy",
        "clustering/nmi": "label NMI",
        "clips_per_s": "clips/s",
    }
    for name, shown in names.items():
        if found.get(name) is not None:
            parts.append(f"{shown} {found[name]:.3g}")
    return "  ".join(parts)


def _last_line(place: Location, name: str) -> dict[str, Any] | None:
    """The last whole line of a file that is being written."""
    newest: dict[str, Any] | None = None
    # A look that fails is made again: it is no reason to end a run.
    with storage_failures_ignored(), contextlib.suppress(ValueError):
        lines = place.tail(name, 8192).split(b"\n")[:-1]
        newest = json.loads(lines[-1]) if lines and lines[-1].startswith(b"{") else None
    return newest


class _Screen(logging.Handler):
    """What stderr is when a line comes: a program or a test may have put another in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        print(self.format(record), file=sys.stderr)


_SCREEN = _Screen()
_SCREEN.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))


def log_to_screen() -> None:
    """Warnings of our packages on stderr, one line each, however often this is called."""
    for name in ("pipeline", "clustering", "training", "deploy", "diccae"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(_SCREEN)
        logger.propagate = False
