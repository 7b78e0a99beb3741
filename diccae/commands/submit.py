"""`diccae submit`: run any diccae command as a job on a Ray cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deploy.command_line import values_of
from diccae.args import Options, config_in, split_at_command
from diccae.commands.logs import write
from diccae.errors import UsageError
from diccae.screen import say
from diccae.subcommands import module_of
from pipeline.passwords import without_passwords


@dataclass(frozen=True)
class SubmitArgs:
    """Pack the code, submit, stream the log, return the job's own exit code.

    Everything after `--` is the command: diccae submit --address URL -- pretrain --config FILE ...
    """

    address: str | None = None
    """The cluster's job server; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    working_dir: str = "."
    """Folder whose code the job gets."""
    env: tuple[str, ...] = ()
    """Variables of the job, NAME=VALUE."""
    exclude: tuple[str, ...] = ()
    """Patterns left out of the package, beside .gitignore."""
    no_wait: bool = False
    """Submit and return at once."""
    dry_run: bool = False
    """Only list what would be sent, what would be left out and why, and the command; no cluster is
    asked."""


OPTIONS = Options("submit", SubmitArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options, command = split_at_command(argv)
    args = OPTIONS.parse(options)
    if not command:
        raise UsageError("nothing to run; end the line with: -- pretrain --config FILE ...")
    command = _as_the_job_reads(command, args.working_dir)
    from deploy.connect import address_or_default
    from deploy.submit import preview, submit

    if args.dry_run:
        return preview(command, working_dir=args.working_dir, excludes=args.exclude, write=write)
    return submit(
        address_or_default(args.address),
        command,
        working_dir=args.working_dir,
        env=dict(_pair(item) for item in args.env),
        excludes=args.exclude,
        wait=not args.no_wait,
        # The command is told, and may hold the URL of a server.
        say=lambda line: say(without_passwords(line)),
        write=write,
    )


def _as_the_job_reads(command: list[str], working_dir: str) -> list[str]:
    """The command with the `--out` that it would take by default, which may not outlive the job.

    Read as the job will, so that nothing is packed and sent to be told of a typo.
    Raises: UsageError, SystemExit(2).
    """
    options: Options[Any] = module_of(command[0]).OPTIONS
    named = config_in(command)
    # Paths are the job's: those of the folder that is sent.
    config = None if named is None else Path(working_dir, named)
    if config is not None and (not config.exists() or "://" in str(named)):
        out = _default_out(options.arguments)
    else:
        out = getattr(options.parse(_with_config(command[1:], config)), "out", None)
    if out is None or values_of(command, "--out"):
        return command
    return [*command, "--out", out]


def _default_out(arguments: type[Any]) -> str | None:
    """What a command takes for `--out` whatever its config says, which only the job can read."""
    default = next((f.default for f in fields(arguments) if f.name == "out"), None)
    return default if isinstance(default, str) else None


def _with_config(words: list[str], config: Path | None) -> list[str]:
    """The words with the config's path as it is from here; the last `--config` counts."""
    return words if config is None else [*words, "--config", str(config)]


def _pair(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        raise UsageError(f"--env {item}: expected NAME=VALUE")
    return name, value
