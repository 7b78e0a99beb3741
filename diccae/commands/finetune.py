"""`diccae finetune`: encoder to classifier."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from diccae.args import parse
from diccae.config import RunConfig
from diccae.screen import say


@dataclass(frozen=True)
class FinetuneArgs:
    """Fine-tune on the labels of the train split. The same command goes on where it stopped."""

    out: str
    """Run folder of `diccae pretrain`, or a new one with --store."""
    store: str | None = None
    """Feature store, for a folder without a pretraining run."""
    encoder: str | None = None
    """Folder of another encoder to start from."""
    config: str | None = None
    """YAML config; without it, the run's own."""
    run: RunConfig = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    from diccae.run_folder import RunFolder, log_to_screen

    first = parse("finetune", FinetuneArgs, argv, ("finetune", "scale", "data"))
    folder = RunFolder(first.out)
    base = None
    if first.config is None and (folder.path / "config.yaml").exists():
        base = folder.config()
    args = parse("finetune", FinetuneArgs, argv, ("finetune", "scale", "data"), base)
    log_to_screen()
    from diccae.stages.finetune import run_finetune
    from diccae.stages.run_record import open_run
    from diccae.stages.statistics import with_store_features

    run = args.run
    if args.store is not None and not folder.record:
        run = with_store_features(folder, run, args.config, args.store)
    folder.open(run, fresh=False)
    open_run(folder, run, args.store)
    run_finetune(folder, run, args.encoder, say)
    say(f"classifier in {args.out}/classifier; next: diccae evaluate --out {args.out}")
    return 0
