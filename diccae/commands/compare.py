"""`diccae compare`: what two runs differ by, clip by clip, with intervals."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from diccae.args import Options
from diccae.errors import UsageError
from diccae.screen import say


@dataclass(frozen=True)
class CompareArgs:
    """Paired differences of a run to another one, or to a file of another project's predictions."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """RUN_A RUN_B, evaluated run folders; RUN_A alone with --predictions. Differences are b - a."""
    predictions: str | None = None
    """Predictions of another model: a CSV, Parquet, or VGGSounder's JSON or pickle (read as
    data); a path or URI."""
    classes: str | None = None
    """Names of the scores' places in --predictions (CSV with display_name); else VGGSounder's."""
    pairs: int = 20
    """Most confused pairs of classes to compare on."""
    resamples: int = 2000
    """Of the bootstrap."""
    html: str | None = None
    """Write a page to this file; a path or URI."""
    json: bool = False
    """Print one JSON line, with every class and every clip left out."""


OPTIONS = Options("compare", CompareArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    if not 1 <= len(args.runs) <= 2:
        raise UsageError(f"found {len(args.runs)} runs; expected RUN_A RUN_B")
    if args.classes is not None and args.predictions is None:
        raise UsageError(
            f"--classes {args.classes} names what --predictions scores; runs know theirs"
        )
    if args.resamples < 100 or args.pairs < 0:
        raise UsageError(f"--resamples {args.resamples} --pairs {args.pairs}; at least 100, and 0")
    from diccae.judging.compare import comparison_table, run_compare, write_page

    found = run_compare(
        args.runs[0],
        args.runs[1] if len(args.runs) == 2 else None,
        args.predictions,
        classes=args.classes,
        n_pairs=args.pairs,
        resamples=args.resamples,
    )
    print(json.dumps(found.as_json()) if args.json else comparison_table(found))
    if args.html:
        write_page(found, args.html)
        say(args.html)
    return 0
