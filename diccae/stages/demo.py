"""The whole of diccae once: clips, store, encoder, classifier, results, report.

Composes the stages; knows nothing of their insides. Invariant: the same folder can be given again,
and every stage that is done is skipped or goes on.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diccae.config import DEMO_TEST, DEMO_TRAIN, RunConfig
from diccae.errors import UsageError
from diccae.fresh import Anew, begins_anew, has_succeeded
from diccae.reach import check_reach
from diccae.resources import embedded_cores, start_ray
from diccae.run_folder import RunFolder, run_place
from diccae.screen import clock
from diccae.stages.ingest import run_ingest
from pipeline.scratch import scratch_folder
from pipeline.storage import Location
from pipeline.synth import clips_written

Say = Callable[[str], None]


class Demo(NamedTuple):
    """What a demo leaves to look at."""

    results: dict[str, Any]
    """Of results.json."""
    page: str
    """Path or URI of the report."""
    mlflow_uri: str
    """Empty where there is none."""


def run_demo(
    config: RunConfig, out: str, data: Path | None, fresh: Sequence[str] | None, say: Say
) -> Demo:
    """Run every stage into `out`, a path or URI.

    Args: data: a folder NAME with `videos/` and NAME.csv in VGGSound's columns; None writes
        synthetic clips first. fresh: the words of the command that begins the run anew; None goes
        on with the one that is there.
    Raises: UsageError if `data` is no such folder, or if not all nodes of the cluster that this
        process joins reach it and `out`; the errors of the stages.
    """
    place = run_place(out)
    folder = RunFolder(place.uri_of("run"))
    with folder.held("demo", config.scale.lease_stale_s):
        if embedded_cores() is None:
            # Before clips are made. The ingest would name a --store, which nobody gave.
            start_ray()
            check_reach({"--data": None if data is None else str(data)}, place.uri)
        anew = begins_anew(folder, fresh, config, say) if fresh is not None else None
        demo = _run_stages(folder, config, place, data=data, anew=anew, say=say)
        has_succeeded(folder)
        return demo


def _run_stages(
    folder: RunFolder,
    config: RunConfig,
    out: Location,
    *,
    data: Path | None,
    anew: Anew | None,
    say: Say,
) -> Demo:
    if anew is None and folder.open(config, fresh=False):
        say(f"going on with the run in {folder.uri}")
    with _clips(out, data, say) as (csv, videos):
        # 4 s of imports, which need one core, beside the processes that make the clips.
        from diccae.stages.evaluate import run_evaluate
        from diccae.stages.finetune import run_finetune
        from diccae.stages.pretrain import run_pretrain
        from diccae.stages.report import run_report
    store = out.uri_of("store")
    summary = run_ingest(csv, videos, store, config.features, config.ingest)
    say(f"ingest    {summary.ok:,} ok, {summary.failed:,} failed in {clock(summary.seconds)}")
    before = folder.results.get("seconds", {}) if anew is None else {}
    run_pretrain(folder, config, store, say, anew=anew)
    folder.write_results(seconds={"ingest": round(before.get("ingest", 0.0) + summary.seconds, 2)})
    run_finetune(folder, config, None, say)
    results = run_evaluate(folder, config, say)
    return Demo(results, run_report(folder, None, say), folder.record["mlflow"]["uri"])


@contextlib.contextmanager
def _clips(out: Location, data: Path | None, say: Say) -> Iterator[tuple[str, str]]:
    """The CSV and the folder of videos; those of the demo's own are there after the block."""
    if data is None:
        made: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not out.exists("clips/clips.csv"):
            say(f"synth     {DEMO_TRAIN + DEMO_TEST} labelled clips in confusable pairs")
            made = _synthesised(out.below("clips"))
        with made:
            yield out.uri_of("clips/clips.csv"), out.uri_of("clips/videos")
        return
    csv, videos = data / f"{data.resolve().name}.csv", data / "videos"
    if not csv.exists() or not videos.is_dir():
        raise UsageError(
            f"{data}: expected {csv.name} (columns id, start, label, split) and a folder videos/ "
            "with <id>_<start, 6 digits>.mp4"
        )
    yield str(csv), str(videos)


@contextlib.contextmanager
def _synthesised(place: Location) -> Iterator[None]:
    """Clips into a folder, their list last."""
    if place.is_local:
        with clips_written(Path(place.path), DEMO_TRAIN, DEMO_TEST, seed=0):
            yield
        return
    with scratch_folder() as scratch:
        folder = Path(scratch)
        with clips_written(folder, DEMO_TRAIN, DEMO_TEST, seed=0):
            yield
        for file in sorted(folder.glob("*/*")):
            place.publish(str(file), str(file.relative_to(folder)))
        place.publish(str(folder / "clips.csv"), "clips.csv")
