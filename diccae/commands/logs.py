"""`diccae logs`: what a job says."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from diccae.args import parse
from diccae.screen import say


@dataclass(frozen=True)
class LogsArgs:
    """Print the log of a job; with --follow stay to its end and return its exit code."""

    job: tyro.conf.Positional[str]
    """Its id, as diccae jobs and diccae submit name it."""
    address: str | None = None
    """The cluster's job server; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    follow: bool = False
    """Go on while the job runs; Ctrl-C leaves it running."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("logs", LogsArgs, argv)
    from deploy import jobs
    from deploy.connect import address_or_default

    address = address_or_default(args.address)
    if args.follow:
        return jobs.follow(address, args.job, say=say, write=write)
    return jobs.read(address, args.job, write=write)


def write(text: str) -> None:
    """A piece of a log to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
