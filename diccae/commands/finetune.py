"""`diccae finetune`: encoder to classifier."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from diccae.args import Options
from diccae.config import RunConfig
from diccae.fresh import Anew, begins_anew, has_succeeded
from diccae.run_folder import RunFolder, log_to_screen
from diccae.screen import say

_FITTED = (
    "name it as encoder.init in the config instead of --encoder, with a new --out: its positions "
    "are then fitted to the clips of the store"
)


@dataclass(frozen=True)
class FinetuneArgs:
    """Fine-tune on the labels of the train split. The same command goes on where it stopped."""

    out: str
    """Run folder of `diccae pretrain`, or a new one with --store."""
    store: str | None = None
    """Feature store, for a folder without a pretraining run; of a run, where its store lies now, if
    it was moved."""
    encoder: str | None = None
    """Folder of another encoder to start from, for clips of the sizes it was trained on."""
    fresh: bool = False
    """Delete the classifier that is in --out, and fine-tune again; once for all attempts of a
    rendered job."""
    dry_run: bool = False
    """Only print parameters, FLOPs, memory and steps."""
    config: str | None = None
    """YAML config; without it, the run's own."""
    run: RunConfig = field(default_factory=RunConfig)


OPTIONS = Options("finetune", FinetuneArgs, ("finetune", "scale", "data", "tracking"))


def main(argv: Sequence[str]) -> int:
    """Run the command."""

    def own_config(args: FinetuneArgs) -> RunConfig | None:
        folder = RunFolder(args.out)
        is_own = args.config is None and folder.place.exists("config.yaml")
        return folder.config() if is_own else None

    args = OPTIONS.parse(argv, own_config)
    from diccae.stages.run_record import nothing_to_read

    folder = RunFolder(args.out)
    log_to_screen()
    if args.dry_run:
        return _dry_run(folder, args)
    if args.store is None and "store" not in folder.record:
        raise nothing_to_read(folder)
    with folder.held("finetune", args.run.scale.lease_stale_s):
        anew = begins_anew(folder, (OPTIONS.command, *argv), args.run, say) if args.fresh else None
        _finetune(folder, args, anew)
        has_succeeded(folder)
    say(f"classifier in {args.out}/classifier; next: diccae evaluate --out {args.out}")
    return 0


def _finetune(folder: RunFolder, args: FinetuneArgs, anew: Anew | None) -> None:
    from diccae.stages.finetune import run_finetune
    from diccae.stages.run_record import open_run, pin_for
    from diccae.stages.statistics import refuse_other_sizes, with_store_features
    from training.run.finetune import refuse_other_settings

    run, has_run = args.run, bool(folder.record)
    if anew is None:
        # Before the folder takes the config over, which tells of the classifier that is there.
        refuse_other_settings(run, args.encoder, folder.place)
    if args.store is not None and not has_run:
        run = with_store_features(folder, run, args.config, args.store)
    if args.encoder is not None:
        # Before the folder is taken: a run that has begun cannot take encoder.init instead.
        spec = pin_for(folder, run, args.store).snapshot.spec
        refuse_other_sizes(args.encoder, spec, _FITTED)
    if anew is not None and has_run:
        folder.refuse_other(run)
    else:
        folder.open(run, fresh=False)
    open_run(folder, run, args.store, say)
    run_finetune(folder, run, args.encoder, say, anew=anew)


def _dry_run(folder: RunFolder, args: FinetuneArgs) -> int:
    from diccae.stages.run_record import pin_for
    from training.run.dry_run import dry_run_finetuning

    data = pin_for(folder, args.run, args.store)
    n_clips, n_classes = len(data.train), len(data.train.classes)
    for name, value in dry_run_finetuning(args.run, data.snapshot.spec, n_clips, n_classes):
        print(f"{name:<18} {value}")
    return 0
