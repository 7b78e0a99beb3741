"""`diccae logs`: what a job says."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from diccae.args import Options
from diccae.errors import UsageError
from diccae.screen import say


@dataclass(frozen=True)
class LogsArgs:
    """Print the log of a job, or with --out those that a run kept when its nodes are gone.

    With --follow stay with the job to its end and return its exit code.
    """

    job: tyro.conf.Positional[str | None] = None
    """Its id, as diccae jobs and diccae submit name it."""
    out: str | None = None
    """Run folder whose kept logs to read; no cluster is asked."""
    attempt: int | None = None
    """--out: of this attempt; None: the newest."""
    of: str = "driver"
    """--out: which process, by the beginning of its name; `all` prints every log."""
    address: str | None = None
    """The cluster's job server; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    follow: bool = False
    """Go on while the job runs; Ctrl-C leaves it running."""


OPTIONS = Options("logs", LogsArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    if (args.job is None) == (args.out is None):
        raise UsageError("logs: name a job (diccae jobs lists them), or a run with --out")
    if args.out is not None:
        return _kept(args.out, args.attempt, args.of)
    assert args.job is not None
    from deploy import jobs
    from deploy.connect import address_or_default

    address = address_or_default(args.address)
    if args.follow:
        return jobs.follow(address, args.job, say=say, write=write)
    return jobs.read(address, args.job, write=write)


def _kept(out: str, attempt: int | None, of: str) -> int:
    from diccae.nodes.kept_logs import read_kept

    text, names = read_kept(out, attempt, of)
    write(text)
    if of != "all" and len(names) > 1:
        say(f"kept, too (--of NAME): {', '.join(name for name in names if name[: len(of)] != of)}")
    return 0


def write(text: str) -> None:
    """A piece of a log to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
