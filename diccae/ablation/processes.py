"""run_all: pieces of work in processes of their own, some at a time, each after what it needs.

Knows nothing of what they do. Invariant: one that fails or is killed costs what waits for it, and
nothing else; what it wrote stays, with its log.
"""

import logging
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from diccae.run_folder import log_to_screen


class Work(NamedTuple):
    """What one process does."""

    key: str
    after: str | None
    """Key of the work that has to be done before."""
    call: Callable[[], None]
    """Travels to the process as a pickle."""
    folder: Path
    """Where its log goes."""


def run_all(
    works: Sequence[Work],
    n_processes: int,
    preload: Sequence[str],
    ended: Callable[[Work, str], None],
) -> dict[str, str]:
    """Run them all. Returns: why the failed ones failed, by key.

    Args: preload: modules that a process has when it starts, forked from a server that has them: a
        run costs no imports. ended: told of each work that ended, and why it failed or "".
    """
    context = _forkserver(preload)
    waiting, running = list(works), dict[Any, tuple[Work, Any]]()
    outcome: dict[str, str] = {}

    def end(work: Work, why: str) -> None:
        outcome[work.key] = why
        ended(work, why)

    try:
        while waiting or running:
            for work in _ready(waiting, outcome):
                if work.after is not None and outcome[work.after]:
                    end(work, f"{work.after} failed")
                elif len(running) < n_processes:
                    process = context.Process(target=_work, args=(work.call, str(work.folder)))
                    process.start()
                    running[process.sentinel] = (work, process)
                else:
                    continue
                waiting.remove(work)
            for sentinel in wait(list(running)) if running else []:
                work, process = running.pop(sentinel)
                process.join()
                end(work, _why(process.exitcode, work.folder))
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return {key: why for key, why in outcome.items() if why}


def _forkserver(preload: Sequence[str]) -> Any:
    # One BLAS thread each unless told otherwise: they share the cores, as Ray's workers do.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(list(preload))
    return multiprocessing.get_context("forkserver")


def _ready(waiting: Sequence[Work], outcome: Mapping[str, str]) -> list[Work]:
    """What waits for nothing that has yet to end."""
    return [work for work in waiting if work.after is None or work.after in outcome]


def _why(exit_code: int | None, folder: Path) -> str:
    if exit_code == 0:
        return ""
    log = folder / "process.log"
    if exit_code is not None and exit_code < 0:
        return f"ended by signal {-exit_code} (see {log})"
    lines = log.read_text().strip().splitlines() if log.exists() else []
    return f"{lines[-1] if lines else 'no word'} (see {log})"


def _end_with_the_command() -> None:
    """A command that was killed must not leave processes that go on writing its runs."""
    command = multiprocessing.parent_process()
    assert command is not None
    wait([command.sentinel])
    os._exit(1)


def _work(call: Callable[[], None], folder: str) -> None:
    """In the process: stdout and stderr, of libraries too, go to the log."""
    os.makedirs(folder, exist_ok=True)
    log = os.open(f"{folder}/process.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    log_to_screen()
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    try:
        call()
    except BaseException:
        traceback.print_exc()
        logging.shutdown()
        os._exit(1)
