"""`diccae register`: a run's model into MLflow's registry, for others to load and serve."""

from collections.abc import Sequence
from dataclasses import dataclass

from diccae.args import Options
from diccae.errors import UsageError


@dataclass(frozen=True)
class RegisterArgs:
    """Register a run's classifier, or its encoder if it has none, as a pyfunc."""

    model: str
    """Run folder."""
    name: str
    """Registered model; the next version of it is made."""
    alias: str = "champion"
    """Alias that points at this version from now on."""


OPTIONS = Options("register", RegisterArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    from diccae.run_folder import RunFolder
    from diccae.stages.run_record import tracking_handle
    from training.predict.registry import register

    folder = RunFolder(args.model)
    if not folder.record:
        raise UsageError(f"{args.model}: no run.json, so no run: give the --out of a run")
    handle = tracking_handle(folder)
    version = register(handle, args.model, args.name, args.alias)
    print(f"models:/{args.name}@{args.alias}: version {version}, in {handle.shown}")
    return 0
