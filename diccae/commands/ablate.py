"""`diccae ablate`: what each part of DICCAE is worth, seed by seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diccae.args import Options
from diccae.commands.pretrain import SECTIONS
from diccae.config import RunConfig
from diccae.errors import UsageError
from diccae.screen import say, table
from pipeline.storage import Location

if TYPE_CHECKING:
    from diccae.ablation.runs import Plan


@dataclass(frozen=True)
class AblateArgs:
    """Train variants of a recipe from shared warm-ups and compare them, paired by seed.

    The same command on the same --out goes on where it stopped. It can name more seeds or variants
    later: what is done is read, not run again, and the table shows what the last call named. A run
    that was finished before its variant was changed is refused.
    """

    store: str
    """URI of the feature store."""
    out: str
    """Folder of the ablation: a path or URI that all nodes reach."""
    config: str | None = None
    """YAML config: the recipe, which is the variant `full`."""
    variants: tuple[str, ...] = ()
    """Variants to run; all but `cavmae` if none is named."""
    variants_file: str | None = None
    """YAML of variants of your own: NAME: {section: {key: value}}; all of them run unless
    --variants names some."""
    sweep: tuple[str, ...] = ()
    """Dose and response: `section.key=value,value,...` is a variant for each value."""
    sweep_of: tuple[str, ...] = ("full",)
    """Variants that are swept, each with its other changes."""
    init: str | None = None
    """Weights that every run starts from, such as an encoder trained to convergence; {seed} in it
    is each run's own."""
    processes: int = 0
    """Runs at a time in processes of this machine, over features decoded once into memory; 0: one
    after the other on Ray. The results are the same."""
    seeds: int = 3
    """Seeds: `seed`, `seed` + 1, ... of the config."""
    metric: str | None = None
    """What they are judged by, as named in MLflow; `probe/audio_video`, or `top1/fusion` with
    --finetune. Fixed by the first call."""
    finetune: bool = False
    """Fine-tune every variant as well."""
    test_clips: bool = False
    """With --processes: measure the test clips, too, at the end and once (test/ in --out)."""
    json: bool = False
    """Print ablation.json as one line on stdout."""
    run: RunConfig = field(default_factory=RunConfig)


OPTIONS = Options("ablate", AblateArgs, (*SECTIONS, "finetune", "evaluate"))


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    from diccae.ablation.results import write_results
    from diccae.ablation.runs import prepare
    from diccae.ablation.side_by_side import SideBySide, run_side_by_side, test_side_by_side
    from diccae.run_folder import RunFolder, log_to_screen

    _check(args)
    log_to_screen()
    plan, config = _plan(args), args.run
    if args.init is not None:
        encoder = config.encoder.model_copy(update={"init": args.init})
        config = config.model_copy(update={"encoder": encoder})
    folder = RunFolder(args.out)
    out = folder.place
    with folder.held("ablate", args.run.scale.lease_stale_s):
        runs, record = prepare(config, plan, args.store, out, say)
        if args.processes:
            made = run_side_by_side(runs, args.processes, say)
        else:
            made = SideBySide(runs.in_turn(say), {})
        folder.check()
        summary = write_results(out, plan, made.done, record, made.failed)
        if args.processes and args.test_clips:
            tested = test_side_by_side(runs, made.done, args.processes, say)
            made.failed.update(tested.failed)
            # MLflow has the run that was compared by validation clips; this is beside it.
            beside = record | {"split": "test", "mlflow": {"uri": "", "run_id": ""}}
            summary = write_results(out.below("test"), plan, tested.done, beside, tested.failed)
    if args.json:
        print(json.dumps(summary.content))
    else:
        for header, rows in summary.tables:
            print(table(header, rows), end="\n\n")
        print(f"{summary.note}\ntable and figure in {out.uri}/ablation.md")
    if made.failed:
        say(f"{len(made.failed)} runs failed; their folders stay, and the same command tries again")
    return 1 if made.failed else 0


def _check(args: AblateArgs) -> None:
    """Raises: UsageError for options that do not go together."""
    if args.seeds < 1:
        raise UsageError(f"--seeds = {args.seeds}: at least 1")
    if args.processes < 0:
        raise UsageError(f"--processes = {args.processes}: 0 (Ray), or how many at a time")
    if args.processes and not Location(args.out).is_local:
        raise UsageError(f"--out {args.out}: --processes writes into a folder of this machine")
    if args.processes and args.run.evaluate.split == "test":
        raise UsageError(
            "--processes compares on clips kept from the train split: give --data.validation-frac "
            "0.2 --evaluate.split validation; --test-clips measures the test clips at the end"
        )
    if args.processes and args.run.scale.use_gpu:
        raise UsageError("--processes computes on CPUs: leave it out, or scale.use_gpu")
    if args.test_clips and not args.processes:
        raise UsageError("--test-clips goes with --processes; on Ray give --evaluate.split test")


def _plan(args: AblateArgs) -> "Plan":
    """What to run. Raises: UsageError."""
    from diccae.ablation.runs import Plan
    from diccae.ablation.variants import chosen_variants

    variants = chosen_variants(args.variants, args.variants_file, args.sweep, args.sweep_of)
    metric = args.metric or ("top1/fusion" if args.finetune else "probe/audio_video")
    seeds = tuple(range(args.run.seed, args.run.seed + args.seeds))
    return Plan(variants, seeds, metric, args.finetune)
