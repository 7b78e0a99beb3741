"""`diccae report`: a run folder to one HTML page."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from diccae.args import Options
from diccae.screen import say


@dataclass(frozen=True)
class ReportArgs:
    """One self-contained page: curves, confusions, clusters, examples, what pins the run."""

    out: str
    """Run folder."""
    store: str | None = None
    """Where the frames are, if the store has moved since."""
    sound: bool = True
    """Clips on the page can be heard, 5 s each, from their sources where these can be reached;
    --no-sound: they cannot."""


OPTIONS = Options("report", ReportArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    from diccae.run_folder import RunFolder, log_to_screen
    from diccae.stages.report import run_report

    folder = RunFolder(args.out)
    log_to_screen()
    with folder.held("report") if folder.record else contextlib.nullcontext():
        print(run_report(folder, args.store, say, with_sound=args.sound))
    return 0
