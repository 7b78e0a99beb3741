"""The `diccae` command: finds the subcommand, runs it, turns errors into one line and an exit code.

Knows nothing of what the subcommands do; imports nothing heavy, so that `--help` answers at once.
Invariant: every path out of here is one of the exit codes below.
"""

import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from diccae import __version__

OK, ERROR, USAGE, TOO_MANY_FAILURES, LOCKED, INTERRUPTED = 0, 1, 2, 3, 4, 130

COMMANDS = {
    "demo": "generate clips, ingest, pretrain, fine-tune, evaluate, report: all of it, once",
    "synth": "write labelled clips in confusable pairs",
    "ingest": "raw clips -> feature store, only what is new or changed",
    "store": "status, failures, quality, stats, verify, compact, vacuum, unpin, export of a store",
    "pretrain": "feature store -> encoder, with clustering rounds beside it",
    "finetune": "encoder -> classifier",
    "evaluate": "top-1, probes, retrieval, confusions -> results.json",
    "predict": "clips -> classes, how sure, what they are confused with; no store needed",
    "compare": "two runs, or a run and another project's predictions, clip by clip",
    "ablate": "what each part of DICCAE is worth: variants, seeds, paired differences",
    "weights": "published weights -> run, encoder or classifier -> CAV-MAE's layout",
    "embed": "feature store + encoder -> Parquet of vectors",
    "cluster": "exact distributed k-means over any Parquet of vectors",
    "register": "run -> MLflow's registry, as a model that others load and serve",
    "report": "run folder -> one HTML page",
    "submit": "run any of these as a job on a Ray cluster",
    "render": "manifests of a cluster that runs any of these (Kubernetes, cloud machines)",
    "jobs": "what runs on a cluster, and what ran there",
    "logs": "what a job says, while it runs and after",
    "stop": "end a job; what it has done is kept",
    "doctor": "check this machine, the cluster, the store and MLflow",
}

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
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        known = ", ".join(COMMANDS)
        print(f"diccae: no command {name!r}.{hint} Commands: {known}", file=sys.stderr)
        return USAGE
    return _run(name, args[1:])


def _run(name: str, argv: list[str]) -> int:
    command = importlib.import_module(f"diccae.commands.{name}")
    try:
        code = command.main(argv)
    except KeyboardInterrupt:
        print(f"diccae {name}: interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
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


def _outside(error: Exception) -> str:
    """What to say of a disk, a bucket or a server that failed; "" if it is none of them."""
    from pipeline.storage import is_storage_failure

    if not is_storage_failure(error):
        return ""
    # deltalake draws a coloured tree of causes.
    said = " ".join(re.sub(r"\x1b\[[0-9;]*m|↳", " ", str(error)).split())
    return (
        f"{type(error).__name__}: {said} (storage or network: check path, endpoint and keys, or "
        'run "diccae doctor --store URI"; DICCAE_TRACEBACK=1 shows where)'
    )


def run() -> NoReturn:
    """The console script: `main` on the command line, then the end of the process."""
    # As Kubernetes and `ray job stop` end a process: a Ctrl-C, also to a command without Ray.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = main()
    if code == INTERRUPTED and "diccae.resources" in sys.modules:
        from diccae.resources import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
