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

    def own_config(args: FinetuneArgs) -> RunConfig | None:
        folder = RunFolder(args.out)
        is_own = args.config is None and (folder.path / "config.yaml").exists()
        return folder.config() if is_own else None

    args = parse("finetune", FinetuneArgs, argv, ("finetune", "scale", "data"), own_config)
    folder = RunFolder(args.out)
    log_to_screen()
    folder.open(args.run, fresh=False)
    from diccae.stages.finetune import run_finetune
    from diccae.stages.run_record import open_run

    open_run(folder, args.run, args.store)
    run_finetune(folder, args.run, args.encoder, say)
    say(f"classifier in {args.out}/classifier; next: diccae evaluate --out {args.out}")
    return 0
