"""An ingest with its progress line: what the command and the demo share.

Imports neither torch nor Ray, so that an ingest with nothing to do ends at once.
"""

from diccae.resources import start_ray
from diccae.screen import ProgressLine, clock
from pipeline.config import FeatureSpec, IngestConfig
from pipeline.ingest import IngestSummary, Progress, ingest


def run_ingest(
    clips: str, videos: str | None, store: str, spec: FeatureSpec | None, config: IngestConfig
) -> IngestSummary:
    """Bring the store up to date, with a progress line."""
    line = ProgressLine()

    def show(progress: Progress) -> None:
        reasons = ", ".join(f"{r} {n}" for r, n in sorted(progress.by_reason.items()))
        line.show(
            f"ingest    {progress.done:,}/{progress.total:,}  ok {progress.ok:,}  failed "
            f"{progress.failed:,}{f' ({reasons})' if reasons else ''}  "
            f"{progress.clips_per_s:.1f} clips/s  left {clock(progress.eta_s)}  "
            f"committed {progress.committed:,}",
            now=progress.done == progress.total,
        )

    try:
        return ingest(clips, videos, store, spec, config, start_ray=start_ray, on_progress=show)
    finally:
        line.close()
