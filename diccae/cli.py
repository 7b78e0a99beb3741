"""The `diccae` command: finds the subcommand, runs it, turns errors into one line and an exit code.

Knows nothing of what the subcommands do; imports nothing heavy, so that `--help` answers at once.
Invariant: every path out of here is one of the exit codes below.
"""

import errno
import gc
import os
import re
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from diccae import __version__
from diccae.errors import UsageError
from diccae.subcommands import COMMANDS, module_of

OK, ERROR, USAGE, TOO_MANY_FAILURES, LOCKED, INTERRUPTED = 0, 1, 2, 3, 4, 130

_EXIT_CODES = """exit codes: 0 ok, 1 error, 2 usage, 3 too many failed clips, 4 locked: another
            process writes there, 130 interrupted (what was done is kept; run it again to go on)"""


def usage() -> str:
    """The help text of `diccae`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_}" for name, help_ in COMMANDS.items()]
    return "\n".join(
        [
            "usage: diccae COMMAND [options]      (diccae COMMAND --help for its options)",
            "",
            *lines,
            "",
            _EXIT_CODES,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns: its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return OK if args else USAGE
    name = args[0]
    if name in ("--version", "version"):
        print(__version__)
        return OK
    try:
        command = module_of(name)
    except UsageError as error:
        print(f"diccae: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:  # Importing it takes half a second.
        return _interrupted(name)
    return _run(command, args[1:])


def _run(command: ModuleType, argv: list[str]) -> int:
    name = command.__name__.rpartition(".")[2]
    try:
        code = command.main(argv)
    except KeyboardInterrupt:
        return _interrupted(name)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        outside = _outside(error)
        if (exit_code is None and not outside) or os.environ.get("DICCAE_TRACEBACK"):
            raise
        print(f"diccae {name}: {outside or error}", file=sys.stderr)
        return int(exit_code or ERROR)
    return int(code or OK)


def _interrupted(name: str) -> int:
    print(f"diccae {name}: interrupted; run the same command again to go on", file=sys.stderr)
    return INTERRUPTED


def _outside(error: Exception) -> str:
    """What to say of a disk, a bucket or a server that failed; "" if it is none of them."""
    from pipeline.storage import is_storage_failure

    if not is_storage_failure(error):
        return ""
    # deltalake draws a coloured tree of causes.
    said = " ".join(re.sub(r"\x1b\[[0-9;]*m|↳", " ", str(error)).split())
    next_step = _NEXT_STEPS.get(getattr(error, "errno", None)) or (
        'storage or network: check path, endpoint and keys, or run "diccae doctor --store URI"'
    )
    return f"{type(error).__name__}: {said} ({next_step}; DICCAE_TRACEBACK=1 shows where)"


_NEXT_STEPS: dict[int | None, str] = {
    errno.ENOSPC: "the disk is full: make room on it, or write to another one",
    errno.EDQUOT: "the quota is used up: make room, or write elsewhere",
    errno.EROFS: "the file system is read-only: write to another one",
    errno.EACCES: "this user may not: change the permissions, or name another place",
    errno.EPERM: "this user may not: change the permissions, or name another place",
    errno.EISDIR: "a folder is there: name a file",
    errno.ENOTDIR: "a file is there, and not a folder: name another place",
}
"""Of a disk: what keys and endpoints have nothing to do with."""


def run() -> NoReturn:
    """The console script: `main` on the command line, then the end of the process."""
    # As Kubernetes and `ray job stop` end a process: a Ctrl-C, also to a command without Ray.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Imports make half a million objects that live until the end. Looking through them for garbage
    # took 1 s of 6 while they came, and 2 s when they all went.
    gc.set_threshold(50_000)
    code = main()
    gc.freeze()
    if code == INTERRUPTED and "diccae.resources" in sys.modules:
        from diccae.resources import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
