"""`diccae stop`: end a job of a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from diccae.args import Options
from diccae.screen import say


@dataclass(frozen=True)
class StopArgs:
    """End a job and wait until it has ended; what it has done is kept."""

    job: tyro.conf.Positional[str]
    """Its id, as diccae jobs and diccae submit name it."""
    address: str | None = None
    """The cluster's job server; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""


OPTIONS = Options("stop", StopArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    from deploy.connect import address_or_default
    from deploy.jobs import stop

    return stop(address_or_default(args.address), args.job, say=say)
