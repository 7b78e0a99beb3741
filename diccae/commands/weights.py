"""`diccae weights`: published weights into a run, and a run's model out of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import tyro

from diccae.args import Options
from diccae.config import RunConfig
from diccae.errors import UsageError
from diccae.screen import say


@dataclass(frozen=True)
class WeightsArgs:
    """Import published weights as a run that can be evaluated; export a model for others."""

    action: tyro.conf.Positional[Literal["import", "export"]]
    """What to do."""
    model: str
    """import: CAV-MAE, MAE or diccae weights; export: OUT/encoder or OUT/classifier. Any URI."""
    out: str
    """import: a new run folder; export: the file to write, such as cavmae.pth, or the folder."""
    to: Literal["cavmae", "hub-folder"] = "cavmae"
    """export: a file in CAV-MAE's layout, or a folder that Hugging Face's tools take."""
    store: str | None = None
    """import: feature store whose spec and classes the run takes."""
    classes: str | None = None
    """import: label list of the weights (CSV: index, mid, display_name); takes their head too."""
    config: str | None = None
    """import: YAML config; its `encoder` section has to be that of the weights."""
    json: bool = False
    """Print one JSON line."""
    run: RunConfig = field(default_factory=RunConfig)


OPTIONS = Options("weights", WeightsArgs, ("encoder", "loss", "data", "tracking"))


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    from training.weights.files import by_part

    _check(args)
    done = _export(args) if args.action == "export" else _import(args)
    if args.json:
        print(json.dumps(done))
    else:
        for name, value in done.items():
            print(f"{name:<11} {by_part(value) if isinstance(value, list) else value}")
    return 0


def _check(args: WeightsArgs) -> None:
    """Options of the other action, which would do nothing."""
    given = {"--store": args.store, "--classes": args.classes, "--config": args.config}
    idle = [name for name, value in given.items() if value is not None]
    if args.action == "export" and idle:
        raise UsageError(
            f"export: {', '.join(idle)}: of import; what is exported is all in {args.model}"
        )
    if args.action == "import" and args.to != "cavmae":
        raise UsageError(f"import: --to {args.to}: of export; any kind of weights is imported")


def _export(args: WeightsArgs) -> dict[str, Any]:
    from training.weights.export import export_file, export_hub

    if args.to == "hub-folder":
        return {"folder": args.out, "files": ", ".join(export_hub(args.model, args.out))}
    n_tensors, labels = export_file(args.model, args.out)
    return {"tensors": n_tensors, "file": args.out, **({"classes": labels} if labels else {})}


def _import(args: WeightsArgs) -> dict[str, Any]:
    if args.store is None:
        raise UsageError("import: --store is needed, for its feature spec and classes")
    from diccae.run_folder import RunFolder
    from diccae.stages.statistics import with_store_features
    from diccae.stages.weights import import_weights

    folder = RunFolder(args.out)
    with folder.held("weights import"):
        if folder.record:
            raise UsageError(
                f"import: {args.out} holds a run already; name a new folder with --out"
            )
        run = with_store_features(folder, args.run, args.config, args.store)
        folder.open(run, fresh=False)
        report = import_weights(folder, run, args.store, args.model, args.classes, say)
    say(f"next: diccae evaluate --out {args.out}, or finetune")
    done = report._asdict()
    del done["made_with"]
    return {**done, "run": args.out}
