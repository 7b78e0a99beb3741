"""`diccae pretrain`: feature store to encoder, with clustering rounds beside it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from diccae.args import Options
from diccae.config import RunConfig
from diccae.screen import say

SECTIONS = (
    "seed",
    "encoder",
    "data",
    "augment",
    "loss",
    "confusion",
    "rounds",
    "clustering",
    "pool",
    "optim",
    "pretrain",
    "scale",
    "tracking",
)


@dataclass(frozen=True)
class PretrainArgs:
    """Pretrain the encoder. The same command on the same --out goes on where it stopped."""

    store: str
    """URI of the feature store."""
    out: str
    """Run folder: a path or URI (s3://bucket/run) that all nodes reach."""
    config: str | None = None
    """YAML config; see configs/."""
    init: str | None = None
    """Weights to start from: CAV-MAE, MAE ViT or diccae, any fsspec URI."""
    fresh: bool = False
    """Delete what is in --out and start again, once for all attempts of a rendered job."""
    dry_run: bool = False
    """Only print parameters, FLOPs, memory, steps and the time they would take."""
    json: bool = False
    """Print the results as one JSON line on stdout, with --dry-run what that says."""
    run: RunConfig = field(default_factory=RunConfig)


OPTIONS = Options("pretrain", PretrainArgs, SECTIONS)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    config = args.run
    if args.init is not None:
        encoder = config.encoder.model_copy(update={"init": args.init})
        config = config.model_copy(update={"encoder": encoder})
    if args.dry_run:
        return _dry_run(config, args.store, args.json)
    from diccae.fresh import begins_anew, has_succeeded
    from diccae.run_folder import RunFolder, log_to_screen
    from diccae.stages.pretrain import run_pretrain
    from diccae.stages.statistics import with_store_features

    log_to_screen()
    folder = RunFolder(args.out)
    with folder.held("pretrain", config.scale.lease_stale_s):
        words = (OPTIONS.command, *argv)
        anew = begins_anew(folder, words, config, say) if args.fresh else None
        is_fresh = anew is not None
        config = with_store_features(folder, config, args.config, args.store, is_fresh)
        if not is_fresh and folder.open(config, fresh=False, pretraining=True):
            say(f"going on with the run in {args.out}, attempt {folder.attempt.number}")
        run_pretrain(folder, config, args.store, say, anew=anew)
        has_succeeded(folder)
    if args.json:
        print(json.dumps(folder.results))
    say(f"encoder in {args.out}/encoder; next: diccae finetune --out {args.out}")
    return 0


def _dry_run(config: RunConfig, store: str, as_json: bool) -> int:
    from training.run.dry_run import dry_run
    from training.run.pinned import check, pin

    data = pin(store, config.data.version, config)
    check(config, data)
    found = dry_run(config, data.snapshot.spec, len(data.train))
    if as_json:
        print(json.dumps(dict(found)))
        return 0
    for name, value in found:
        print(f"{name:<18} {value}")
    return 0
