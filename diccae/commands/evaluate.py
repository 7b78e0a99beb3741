"""`diccae evaluate`: what a run is worth on the test split."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diccae.args import parse
from diccae.config import RunConfig
from diccae.screen import say, table
from training.config import STREAMS


@dataclass(frozen=True)
class EvaluateArgs:
    """Top-1, probes, retrieval and confusions into results.json."""

    out: str
    """Run folder."""
    json: bool = False
    """Print results.json as one line on stdout."""
    run: RunConfig = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    from diccae.run_folder import RunFolder, log_to_screen

    def own_config(args: EvaluateArgs) -> RunConfig:
        return RunFolder(args.out).config()

    args = parse("evaluate", EvaluateArgs, argv, ("evaluate", "scale"), own_config)
    folder = RunFolder(args.out)
    log_to_screen()
    from diccae.stages.evaluate import run_evaluate

    with folder.held("evaluate", args.run.scale.lease_stale_s):
        results = run_evaluate(folder, args.run, say)
    print(json.dumps(results) if args.json else results_table(results))
    return 0


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
