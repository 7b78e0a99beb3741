"""`diccae evaluate`: what a run is worth on the test split."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diccae.args import Options
from diccae.config import RunConfig
from diccae.errors import UsageError
from diccae.screen import say, table
from training.config import STREAMS

if TYPE_CHECKING:
    from diccae.run_folder import RunFolder


@dataclass(frozen=True)
class EvaluateArgs:
    """Top-1, probes, retrieval and confusions into results.json."""

    out: str
    """Run folder."""
    store: str | None = None
    """Where the run's store lies now, if it was moved; it must hold what the run read."""
    vggsounder: bool = False
    """Measure on VGGSounder's labels, too (pip install 'diccae[vggsounder]')."""
    vggsounder_labels: str | None = None
    """A CSV of VGGSounder's columns instead of the one in its package, such as an older version."""
    export_predictions: str | None = None
    """Path or URI of a file for the predictions, as VGGSounder's own benchmark reads them."""
    reuse: bool = False
    """Take the predictions of the last evaluation; models and clips are not touched."""
    json: bool = False
    """Print results.json as one line on stdout."""
    run: RunConfig = field(default_factory=RunConfig)


OPTIONS = Options("evaluate", EvaluateArgs, ("evaluate", "scale", "tracking"))


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    from diccae.run_folder import RunFolder, log_to_screen

    def own_config(args: EvaluateArgs) -> RunConfig:
        return RunFolder(args.out).config()

    args = OPTIONS.parse(argv, own_config)
    folder = RunFolder(args.out)
    _refuse(args)
    if not args.reuse and "store" not in folder.record:
        raise UsageError(
            f"{folder.uri}: no run.json that names a store, so no run that began; start it with "
            f"diccae pretrain --out {args.out}, or finetune or weights import"
        )
    log_to_screen()
    from diccae.judging.vggsounder import export_predictions, vggsounder_table

    with folder.held("evaluate", args.run.scale.lease_stale_s):
        results = _evaluate(args, folder)
        if args.export_predictions:
            done = export_predictions(folder, args.export_predictions)
            say(f"{done['file']}: {done['n_clips']:,} clips in VGGSounder's format")
    if args.json:
        print(json.dumps(results))
        return 0
    print(results_table(results))
    if args.vggsounder or args.vggsounder_labels:
        print(vggsounder_table(results["vggsounder"]))
    return 0


def _refuse(args: EvaluateArgs) -> None:
    """What would end the command after the evaluation, its results unshown."""
    if not (args.vggsounder or args.vggsounder_labels or args.export_predictions):
        return
    from pipeline.storage import Location
    from training.vggsounder.labels import class_names, read_labels

    if args.vggsounder or args.vggsounder_labels:
        read_labels(args.vggsounder_labels)
    if args.export_predictions:
        class_names()
        place = Location(args.export_predictions)
        if place.fs.isdir(place.path):
            where = f"--export-predictions {args.export_predictions}"
            raise UsageError(f"{where}: a folder; name a file in it")


def _evaluate(args: EvaluateArgs, folder: "RunFolder") -> dict[str, Any]:
    from diccae.judging.predicted import predictions_of
    from diccae.judging.vggsounder import run_vggsounder
    from diccae.stages.run_record import follow_store, keep_pinned

    if args.store is not None:
        follow_store(folder, args.run, args.store)
    elif folder.record.get("store"):
        keep_pinned(folder)
    if args.reuse:
        predictions_of(folder, args.run.digest())
        results = folder.results
        if "n_test" not in results:
            raise UsageError(
                f"{folder.uri}/results.json: holds no results of the evaluation whose predictions "
                "are there (it was interrupted): leave out --reuse"
            )
    else:
        from diccae.stages.evaluate import run_evaluate

        results = run_evaluate(folder, args.run, say)
    if args.vggsounder or args.vggsounder_labels:
        results = run_vggsounder(folder, args.vggsounder_labels, say)
    return results


def results_table(results: dict[str, Any]) -> str:
    """What was measured, in per cent: a row a stream, then a line for each other metric."""
    from training.evaluation.metrics import BOTH_SIDES, present

    split, metrics = results.get("split", "test"), present(results)
    columns = [metric for metric in metrics if metric.grid is None]
    rows = []
    for stream in (*STREAMS, BOTH_SIDES):
        values = [results[metric.name].get(stream) for metric in columns]
        if values.count(None) < len(values):
            rows.append([stream, *(f"{100 * v:.1f}" if v is not None else "-" for v in values)])
    lines = [table([f"% of {split} clips", *(metric.name for metric in columns)], rows)]
    for metric in metrics:
        if metric.grid is not None:
            found = results[metric.name]
            shown = [f"{v} {100 * found[v]:.1f}" for v in metric.headline if v in found]
            lines.append(f"{metric.title}  {'  '.join(shown)}")
    pairs = results.get("confusion", {}).get("worst_pairs", [])[:3]
    if pairs:
        worst = "; ".join(f"{a} / {b} {100 * degree:.0f} %" for a, b, degree in pairs)
        lines.append(f"most confused   {worst}")
    lines.append(f"{f'{split} clips':<15} {results['n_test']:,}")
    return "\n".join(lines)
