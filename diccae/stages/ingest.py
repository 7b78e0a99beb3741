"""An ingest with its progress, on the screen and in MLflow: what the command and the demo share.

Imports neither torch nor Ray, so that an ingest with nothing to do ends at once.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from diccae.resources import embedded_cores, start_ray
from diccae.screen import ProgressLine, clock
from pipeline.config import FeatureSpec, IngestConfig
from pipeline.ingest.run import IngestSummary, Progress, ingest
from training.config import TrackingConfig
from training.tracking import tracker as tracking
from training.tracking.copier import RunHandle


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
        the ingest down as an MLflow run of its own; None or no URI: not.
    """
    if config.workers is None:
        # One per core: the spare CPUs of an embedded cluster are none to decode on.
        config = config.model_copy(update={"workers": embedded_cores()})
    line = ProgressLine()
    params = {"clips": clips, "videos": videos, "store": store, "ingest": config.model_dump()}
    if spec is not None:
        params["features"] = spec.model_dump()
    run = _IngestRun(tracked, params) if tracked is not None and tracked.uri else None

    def show(progress: Progress) -> None:
        line.show(_in_words(progress), now=progress.done == progress.total)
        if run is not None:
            run.log(progress)

    status, summary = "FAILED", None
    try:
        summary = ingest(
            clips,
            videos,
            store,
            spec,
            config,
            start_ray=start_ray,
            on_progress=show,
            label_from_folder=label_from_folder,
        )
        status = "FINISHED"
        return summary
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        line.close()
        if run is not None:
            run.end(status, summary)


def _in_words(progress: Progress) -> str:
    reasons = ", ".join(f"{r} {n}" for r, n in sorted(progress.by_reason.items()))
    return (
        f"ingest    {progress.done:,}/{progress.total:,}  ok {progress.ok:,}  failed "
        f"{progress.failed:,}{f' ({reasons})' if reasons else ''}  "
        f"{progress.clips_per_s:.1f} clips/s  left {clock(progress.eta_s)}  "
        f"committed {progress.committed:,}"
    )


class _IngestRun:
    """The MLflow run of an ingest, made at its first progress: nothing to do leaves no run."""

    def __init__(self, config: TrackingConfig, params: dict[str, Any]) -> None:
        self._config, self._params = config, params
        self._done = 0
        self._handle: RunHandle | None = None
        self._tracker: tracking.Tracker | None = None

    def log(self, progress: Progress) -> None:
        """A point of the curves; its step is the number of clips done."""
        if self._tracker is None:
            self._begin()
        assert self._tracker is not None
        point = {
            "ok": progress.ok,
            "failed": progress.failed,
            "committed": progress.committed,
            "clips_per_s": progress.clips_per_s,
            **{f"failed/{reason}": n for reason, n in progress.by_reason.items()},
        }
        if progress.eta_s is not None:
            point["eta_s"] = progress.eta_s
        self._done = progress.done
        self._tracker.log(self._done, point)

    def _begin(self) -> None:
        scratch = tempfile.mkdtemp(prefix="diccae-ingest-")
        store = str(self._params["store"])
        tags = {"mlflow.runName": f"ingest {Path(store).name}", "store.uri": store}
        self._handle = tracking.create_run(self._config, scratch, self._params, tags, {})
        self._tracker = tracking.Tracker(self._handle, Path(scratch) / "metrics.jsonl")

    def end(self, status: str, summary: IngestSummary | None) -> None:
        """The summary as last numbers, and the end of the run."""
        if self._tracker is None or self._handle is None:
            return
        if summary is not None:
            self._tracker.log(self._done, summary.to_json())
        self._tracker.close()
        tracking.finish(self._handle, status)
        shutil.rmtree(self._handle.out, ignore_errors=True)
