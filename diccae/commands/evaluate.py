"""`diccae evaluate`: what a run is worth on the test split."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from diccae.args import parse
from diccae.config import RunConfig
from diccae.screen import say, table


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

    results = run_evaluate(folder, args.run, say)
    print(json.dumps(results) if args.json else results_table(results))
    return 0


def results_table(results: dict) -> str:
    """Accuracies of a run in per cent, one row per stream."""
    rows = []
    split = results.get("split", "test")
    columns = [name for name in ("top1", "top5", "probe", "knn") if name in results]
    for stream in ("audio", "video", "fusion", "audio_video"):
        values = [results[name].get(stream) for name in columns]
        if values.count(None) < len(values):
            rows.append([stream, *(f"{100 * v:.1f}" if v is not None else "-" for v in values)])
    lines = [table([f"% of {split} clips", *columns], rows)]
    found = results.get("retrieval", {})
    if found:
        lines.append(
            f"retrieval R@1  audio->video {100 * found['a2v_r1']:.1f} %  video->audio "
            f"{100 * found['v2a_r1']:.1f} %  ({int(found['n_clips'])} clips)"
        )
    pairs = results.get("confusion", {}).get("worst_pairs", [])[:3]
    if pairs:
        worst = "; ".join(f"{a} / {b} {100 * degree:.0f} %" for a, b, degree in pairs)
        lines.append(f"most confused   {worst}")
    lines.append(f"{f'{split} clips':<15} {results['n_test']:,}")
    return "\n".join(lines)
