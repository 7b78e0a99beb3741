"""`diccae logs`: what a job says."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

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
    tail: int | None = None
    """Only the last so many lines that are there; of --of all, of each log."""


_TAKEN_WITH = {"attempt": "--out", "of": "--out", "address": "a job", "follow": "a job"}
"""What an option needs to be looked at; what is not named here is for both."""


OPTIONS = Options("logs", LogsArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    if (args.job is None) == (args.out is None):
        raise UsageError("name a job (diccae jobs lists them), or a run with --out")
    _refuse_options_of_the_other(args)
    if args.out is not None:
        return _kept(args.out, args.attempt, args.of, args.tail)
    assert args.job is not None
    from deploy import jobs
    from deploy.connect import address_or_default

    address = address_or_default(args.address)
    if args.follow:
        return jobs.follow(address, args.job, say=say, write=write)
    return jobs.read(address, args.job, write=lambda text: write(last_lines(text, args.tail)))


def _refuse_options_of_the_other(args: LogsArgs) -> None:
    """Raises: UsageError for an option that would not be looked at."""
    used = "a job" if args.out is None else "--out"
    for field in fields(args):
        needed = _TAKEN_WITH.get(field.name, used)
        if needed != used and getattr(args, field.name) != field.default:
            raise UsageError(f"--{field.name} goes with {needed}, not with {used}; leave it out")
    if args.tail is not None and (args.tail < 1 or args.follow):
        told = "goes without --follow" if args.follow else "1 or more are allowed"
        raise UsageError(f"--tail {args.tail}: {told}")


def last_lines(text: str, n_lines: int | None) -> str:
    """The end of a text; None: all of it."""
    return text if n_lines is None else "".join(text.splitlines(keepends=True)[-n_lines:])


def _kept(out: str, attempt: int | None, of: str, tail: int | None) -> int:
    from diccae.nodes.kept_logs import read_kept

    texts, names = read_kept(out, attempt, of)
    write("".join(last_lines(text, tail) for text in texts))
    if of != "all" and len(names) > 1:
        say(f"kept, too (--of NAME): {', '.join(name for name in names if name[: len(of)] != of)}")
    return 0


def write(text: str) -> None:
    """A piece of a log to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
