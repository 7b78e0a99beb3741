"""A look at the clips and the statistics of a store, with progress on the screen.

Imports neither torch nor Ray: what commands share with the pretraining stage.
"""

from diccae.screen import ProgressLine, clock, table
from pipeline.quality.run import Progress, QualitySummary, check_quality
from pipeline.quality.stats import FeatureStats, compute_stats
from pipeline.store.store import FeatureStore, Snapshot
from pipeline.store.vacuumed import whole_snapshot


def run_quality(store: str, split: str | None, *, reads_sources: bool) -> QualitySummary:
    """Bring the quality table of the store up to date."""
    line = _Line("quality")
    try:
        return check_quality(store, split, reads_sources=reads_sources, on_progress=line.show)
    finally:
        line.close()


def run_stats(store: str, split: str, version: int | None = None) -> FeatureStats:
    """Statistics of the split's features, pixels too: those in the store if nothing changed."""
    line = _Line("stats")
    target = FeatureStore.open(store)
    try:
        snapshot = whole_snapshot(target, version)
        return compute_stats(target, snapshot, split, on_progress=line.show)
    finally:
        line.close()


def run_fbank_stats(snapshot: Snapshot, split: str) -> FeatureStats:
    """Statistics of the split's fbanks alone, which take a twentieth of the time."""
    line = _Line("stats")
    store = FeatureStore.open(snapshot.uri)
    try:
        return compute_stats(store, snapshot, split, with_pixels=False, on_progress=line.show)
    finally:
        line.close()


def quality_lines(summary: QualitySummary) -> list[str]:
    """The summary for the screen."""
    rows = [
        (one.rule, f"{one.hits:,}", f"{one.judged:,}", "  ".join(one.examples))
        for one in summary.rules
    ]
    lines = [table(["rule", "clips", "judged", "such as"], rows), ""]
    others = {why: n for why, n in summary.sources.items() if why != "read"}
    if others:
        told = ", ".join(f"{why} {n:,}" for why, n in others.items())
        lines.append(f"sources not read: {told}")
    if summary.not_judged:
        told = ", ".join(f"{rule} {n:,}" for rule, n in summary.not_judged.items())
        lines.append(f"clips not judged: {told}")
    lines.append(
        f"{summary.clips:,} clips at version {summary.version}, {summary.looked_at:,} looked at "
        f"now; table: {summary.table}"
    )
    return lines


class _Line:
    """Progress of a scan: how many, how fast, how long still."""

    def __init__(self, what: str) -> None:
        self._what, self._line = what, ProgressLine()

    def show(self, progress: Progress) -> None:
        self._line.show(
            f"{self._what:<9} {progress.done:,}/{progress.total:,}  "
            f"{progress.clips_per_s:.1f} clips/s  left {clock(progress.eta_s)}",
            now=progress.done == progress.total,
        )

    def close(self) -> None:
        self._line.close()
