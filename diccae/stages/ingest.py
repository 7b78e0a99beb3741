"""An ingest with its progress, on the screen and in MLflow: what the command and the demo share.

Imports neither torch nor Ray, so that an ingest with nothing to do ends at once.
"""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

from diccae.reach import check_reach
from diccae.resources import embedded_cores, job_id, nodes_at_most, nodes_up, start_ray
from diccae.screen import ProgressLine, clock, say
from pipeline.config import FeatureSpec, IngestConfig
from pipeline.ingest.run import IngestSummary, Progress, ingest
from pipeline.scratch import scratch_folder
from pipeline.source.listing import local_clip
from pipeline.storage import Location
from training.cluster_config import TrackingConfig
from training.tracking import mlflow_run as tracking
from training.tracking.client import RunHandle
from training.tracking.copier import copied
from training.tracking.destination import destination, named
from training.tracking.tracker import METRICS, Tracker

_LOCAL_CLIPS_ALONE = 1024
"""Where Ray brings no cores it costs 14 s of two of them; that is little only above this."""


def run_ingest(
    clips: str | None,
    videos: str | None,
    store: str,
    spec: FeatureSpec | None,
    config: IngestConfig,
    tracked: TrackingConfig | None = None,
    *,
    label_from_folder: bool = False,
) -> IngestSummary:
    """Bring the store up to date, with a progress line.

    Args: clips, videos, label_from_folder: as list_sources takes them; tracked: where to write
        the ingest down as an MLflow run of its own; None, or where neither it nor the environment
        names a URI: not.
    """
    config = _for_machine_alone(config) if embedded_cores() else config
    params = {"clips": clips, "videos": videos, "store": store, "ingest": config.model_dump()}
    if spec is not None:
        params["features"] = spec.model_dump()
    with _IngestRun(tracked, params) as run, contextlib.closing(ProgressLine()) as line:

        def show(progress: Progress) -> None:
            run.log(progress)
            line.show(_in_words(progress), now=progress.done == progress.total)

        summary = ingest(
            clips,
            videos,
            store,
            spec,
            config,
            start_ray=partial(_start_cluster, clips, videos, store),
            on_progress=show,
            label_from_folder=label_from_folder,
        )
        run.conclude(summary)
    return summary


def _for_machine_alone(config: IngestConfig) -> IngestConfig:
    """What the config leaves open, where Ray would start in this process and bring no cores."""
    # One per core: the spare CPUs of an embedded cluster are none to decode on.
    usual = {"workers": embedded_cores(), "local_clips": _LOCAL_CLIPS_ALONE}
    return config.model_copy(update={k: v for k, v in usual.items() if getattr(config, k) is None})


def _start_cluster(clips: str | None, videos: str | None, store: str) -> None:
    start_ray()
    if nodes_at_most() and not any(node.cpus for node in nodes_up()):
        say("waiting   for the first node: the autoscaler starts it, and decoding begins there")
    listed = None if clips is None else local_clip(clips, videos)
    check_reach({"--store": store, "--videos": videos, "--clips, which names": listed})


def _in_words(progress: Progress) -> str:
    reasons = ", ".join(f"{r} {n}" for r, n in sorted(progress.by_reason.items()))
    return (
        f"ingest    {progress.done:,}/{progress.total:,}  ok {progress.ok:,}  failed "
        f"{progress.failed:,}{f' ({reasons})' if reasons else ''}  "
        f"{progress.clips_per_s:.1f} clips/s  left {clock(progress.eta_s)}  "
        f"committed {progress.committed:,}"
    )


class _IngestRun:
    """The MLflow run of an ingest, made at its first progress: nothing to do leaves no run.

    Without a config, or where nothing names a server, it keeps silent.
    """

    def __init__(self, config: TrackingConfig | None, params: dict[str, Any]) -> None:
        self._config, self._params = config, params
        self._done = 0
        self._point: dict[str, float] = {}
        self._handle: RunHandle | None = None
        self._tracker: Tracker | None = None
        self._copied, self._files = contextlib.ExitStack(), contextlib.ExitStack()

    def log(self, progress: Progress) -> None:
        """A point of the curves; its step is the number of clips done."""
        if self._config is None or not named(self._config)[0]:
            return
        if self._tracker is None:
            self._tracker = self._begin(self._config)
        point = {
            "ok": progress.ok,
            "failed": progress.failed,
            "committed": progress.committed,
            "clips_per_s": progress.clips_per_s,
            **{f"failed/{reason}": n for reason, n in progress.by_reason.items()},
        }
        if progress.eta_s is not None:
            point["eta_s"] = progress.eta_s
        # The last report of a step counts, which says what was committed.
        if self._point and progress.done != self._done:
            self._tracker.log(self._done, self._point)
        self._done, self._point = progress.done, point

    def _begin(self, config: TrackingConfig) -> Tracker:
        scratch = self._files.enter_context(scratch_folder())
        store = str(self._params["store"])
        say(f"tracking  {destination(config, scratch)}")
        tags = {"mlflow.runName": f"ingest {Path(store).name}", "store.uri": store, "job": job_id()}
        self._handle = tracking.create_run(config, scratch, self._params, tags, {})
        place = Location(scratch)
        tracker = Tracker(place.uri_of(METRICS))
        self._copied.enter_context(copied(self._handle, place, METRICS))
        return tracker

    def conclude(self, summary: IngestSummary) -> None:
        """The summary as last numbers of the curves."""
        if self._tracker is not None:
            self._tracker.log(self._done, self._point | summary.to_json())

    def __enter__(self) -> "_IngestRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The end of the run, with how the ingest ended."""
        with self._files:
            self._end(kind)

    def _end(self, kind: type[BaseException] | None) -> None:
        if self._tracker is None or self._handle is None:
            return
        self._tracker.log(self._done, self._point)
        self._tracker.close()
        self._copied.close()
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        tracking.finish(
            self._handle, "KILLED" if stopped else "FAILED" if kind is not None else "FINISHED"
        )
