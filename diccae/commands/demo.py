"""`diccae demo`: everything, once."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diccae.args import Options
from diccae.config import SHIPPED, RunConfig, load_config
from diccae.screen import say
from pipeline.passwords import without_passwords


@dataclass(frozen=True)
class DemoArgs:
    """Clips -> store -> encoder -> classifier -> results -> report, in one run."""

    out: str = "out/demo"
    """Folder or URI for everything the demo makes."""
    data: str | None = None
    """Folder NAME with videos/ and NAME.csv in VGGSound's columns; None writes synthetic clips."""
    config: str | None = None
    """YAML config; None: configs/smoke.yaml, or configs/av-digits.yaml with --data."""
    fresh: bool = False
    """Start again in a folder that holds another run, once for all attempts of a rendered job."""
    run: RunConfig = field(default_factory=RunConfig)


OPTIONS = Options("demo", DemoArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""

    def recipe(args: DemoArgs) -> RunConfig | None:
        name = "smoke.yaml" if args.data is None else "av-digits.yaml"
        return load_config(SHIPPED / name) if args.config is None else None

    args = OPTIONS.parse(argv, recipe)
    from diccae.commands.evaluate import results_table
    from diccae.run_folder import log_to_screen
    from diccae.stages.demo import run_demo

    log_to_screen()
    data = None if args.data is None else Path(args.data)
    fresh = (OPTIONS.command, *argv) if args.fresh else None
    demo = run_demo(args.run, args.out, data, fresh, say)
    print(f"{results_table(demo.results)}\n\nreport    {demo.page}")
    if demo.mlflow_uri.startswith("http"):
        print(f"curves    {without_passwords(demo.mlflow_uri)}")
    elif demo.mlflow_uri:
        # `make demo` runs in an environment that need not be on the PATH of who reads this.
        mlflow = "mlflow" if shutil.which("mlflow") else f"{sys.executable} -m mlflow"
        print(f"curves    {mlflow} ui --backend-store-uri {demo.mlflow_uri}")
    return 0
