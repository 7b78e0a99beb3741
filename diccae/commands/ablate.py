"""`diccae ablate`: what each part of DICCAE is worth, seed by seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from diccae.args import parse
from diccae.commands.pretrain import SECTIONS
from diccae.config import RunConfig
from diccae.errors import UsageError
from diccae.screen import say, table


@dataclass(frozen=True)
class AblateArgs:
    """Train variants of a recipe from shared warm-ups and compare them, paired by seed.

    The same command on the same --out goes on where it stopped. It can name more seeds or variants
    later: what is done is read, not run again, and the table shows what the last call named.
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
    """YAML of variants of your own: NAME: {section: {key: value}}."""
    seeds: int = 3
    """Seeds: `seed`, `seed` + 1, ... of the config."""
    metric: str | None = None
    """What they are judged by, as named in MLflow; `probe/audio_video`, or `top1/fusion` with
    --finetune. Fixed by the first call."""
    finetune: bool = False
    """Fine-tune every variant as well."""
    json: bool = False
    """Print ablation.json as one line on stdout."""
    run: RunConfig = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("ablate", AblateArgs, argv, (*SECTIONS, "finetune", "evaluate"))
    from diccae.run_folder import RunFolder, log_to_screen
    from diccae.stages.ablate import Plan, read_variants, run_ablation, write_results
    from training.evaluation.variants import DEFAULT_VARIANTS

    if args.seeds < 1:
        raise UsageError(f"--seeds = {args.seeds}: at least 1")
    names = args.variants or (() if args.variants_file else DEFAULT_VARIANTS)
    variants = read_variants(names, args.variants_file)
    metric = args.metric or ("top1/fusion" if args.finetune else "probe/audio_video")
    seeds = tuple(range(args.run.seed, args.run.seed + args.seeds))
    log_to_screen()
    plan = Plan(variants, seeds, metric, args.finetune)
    folder = RunFolder(args.out)
    out = folder.place
    with folder.held("ablate", args.run.scale.lease_stale_s):
        done, record = run_ablation(args.run, plan, args.store, out, say)
        folder.check()
        summary = write_results(out, plan, done, record)
    if args.json:
        print(json.dumps(summary.content))
        return 0
    for header, rows in summary.tables:
        print(table(header, rows), end="\n\n")
    print(f"{summary.note}\ntable and figure in {out.uri}/ablation.md")
    return 0
