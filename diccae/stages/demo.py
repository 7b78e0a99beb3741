"""The whole of diccae once: clips, store, encoder, classifier, results, report.

Composes the stages; knows nothing of their insides. Invariant: the same folder can be given again,
and every stage that is done is skipped or goes on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from diccae.config import RunConfig
from diccae.errors import UsageError
from diccae.run_folder import RunFolder
from diccae.screen import clock
from diccae.stages.evaluate import run_evaluate
from diccae.stages.finetune import run_finetune
from diccae.stages.ingest import run_ingest
from diccae.stages.pretrain import run_pretrain
from diccae.stages.report import run_report
from pipeline.synth import write_clips

Say = Callable[[str], None]

_TRAIN, _TEST = 360, 120


class Demo(NamedTuple):
    """What a demo leaves to look at."""

    results: dict[str, Any]
    """Of results.json."""
    page: Path
    """The report."""
    mlflow_uri: str


def run_demo(config: RunConfig, out: Path, data: Path | None, fresh: bool, say: Say) -> Demo:
    """Run every stage into `out`.

    Args: data: a folder NAME with `videos/` and NAME.csv in VGGSound's columns; None writes
        synthetic clips first.
    Raises: UsageError if `data` is no such folder; the errors of the stages.
    """
    folder = RunFolder(out / "run")
    with folder.held("demo", config.scale.lease_stale_s):
        return _run_stages(folder, config, out, data=data, fresh=fresh, say=say)


def _run_stages(
    folder: RunFolder, config: RunConfig, out: Path, *, data: Path | None, fresh: bool, say: Say
) -> Demo:
    if folder.open(config, fresh):
        say(f"going on with the run in {folder.path}")
    csv, videos = _clips(out, data, say)
    store = str(out / "store")
    summary = run_ingest(str(csv), str(videos), store, config.features, config.ingest)
    say(f"ingest    {summary.ok:,} ok, {summary.failed:,} failed in {clock(summary.seconds)}")
    spent = folder.results.get("seconds", {}).get("ingest", 0.0)
    run_pretrain(folder, config, store, say)
    folder.write_results(seconds={"ingest": round(spent + summary.seconds, 2)})
    run_finetune(folder, config, None, say)
    results = run_evaluate(folder, config, say)
    return Demo(results, run_report(folder, None), folder.record["mlflow"]["uri"])


def _clips(out: Path, data: Path | None, say: Say) -> tuple[Path, Path]:
    """The CSV and the folder of videos."""
    if data is None:
        folder = out / "clips"
        csv = folder / "clips.csv"
        if not csv.exists():
            say(f"synth     {_TRAIN + _TEST} labelled clips in confusable pairs")
            write_clips(folder, _TRAIN, _TEST, seed=0)
        return csv, folder / "videos"
    csv, videos = data / f"{data.resolve().name}.csv", data / "videos"
    if not csv.exists() or not videos.is_dir():
        raise UsageError(
            f"{data}: expected {csv.name} (columns id, start, label, split) and a folder videos/ "
            "with <id>_<start, 6 digits>.mp4"
        )
    return csv, videos
