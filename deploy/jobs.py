"""Job: what became of a command that was handed to a cluster: listed, read, followed, stopped.

Knows nothing of how a job was packed or what its command does. Invariant: each line of a log is
written once, however often the stream breaks; leaving (Ctrl-C) never stops a job.
"""

import asyncio
import difflib
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deploy.command_line import values_of
from deploy.connect import Cluster, connect
from deploy.errors import ClusterUnreachable, DeployError

Say = Callable[[str], None]

INTERRUPTED = 130
_POLL_S = 0.2
_TAKE_UP_S = 1.0
_LOST_S = 60.0
_SAY_AGAIN_S = 5.0
_NAMED = 3
"""Jobs that the message about an unknown one names of each kind."""


class Job(NamedTuple):
    """One job of a cluster."""

    id: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
    command: str
    """The words after `diccae`; the whole entry point of a job that is none of ours."""
    out: str
    """Its `--out`, as given; empty without one."""
    started_s: float
    """Unix time; 0 before it has started."""
    ended_s: float
    """0 while it has not."""
    exit_code: int | None
    """The driver's own; None while it runs, or if it never ran."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ("SUCCEEDED", "STOPPED", "FAILED")


def facts(args: Sequence[str]) -> dict[str, str]:
    """What a job's metadata say of `diccae <args>`; a manifest's job is told by its command."""
    out = values_of(args, "--out")
    return {"diccae.command": shlex.join(args), "diccae.out": out[-1] if out else ""}


def jobs(address: str) -> list[Job]:
    """All jobs the cluster knows, newest first."""
    return _jobs(connect(address))


def follow(address: str, job_id: str, *, say: Say, write: Say) -> int:
    """Stay with a job, from its first line to its end; its exit code."""
    cluster = connect(address)
    find(cluster, job_id)
    return stay_with(cluster, address, job_id, say=say, write=write)


def read(address: str, job_id: str, *, write: Say) -> int:
    """Write what a job has said until now; 0."""
    cluster = connect(address)
    find(cluster, job_id)
    try:
        write(str(cluster.client.get_job_logs(job_id)))
    except (RuntimeError, OSError) as error:
        raise ClusterUnreachable(
            f"{cluster.url}: the log of {job_id} is not there ({_first_line(error)}); the node of "
            "its driver may be gone: diccae logs --out RUN reads what its run kept"
        ) from error
    return 0


def stop(address: str, job_id: str, *, say: Say, timeout_s: float = 180.0) -> int:
    """End a job and wait until it has ended; 0.

    Raises: DeployError if it has not after `timeout_s`.
    """
    cluster = connect(address)
    job = find(cluster, job_id)
    if job.is_over:
        say(f"job      {job_id} is over already: {job.state}")
        return 0
    cluster.client.stop_job(job_id)
    started = said_at = time.monotonic()
    say(f"stopping {job_id}: it keeps what is done, and ends")
    while not (job := find(cluster, job_id)).is_over:
        now = time.monotonic()
        if now - started > timeout_s:
            raise DeployError(
                f"{job_id} is still {job.state} {timeout_s:.0f} s after the stop; read why with "
                f"diccae logs {job_id} --address {address}"
            )
        if now - said_at > _SAY_AGAIN_S:
            say(f"stopping {job_id}: {job.state} for {now - started:.0f} s")
            said_at = now
        time.sleep(_POLL_S)
    kept = f"; {job.out} keeps what was done, the same command goes on" if job.out else ""
    say(f"job      {job_id} is {job.state} after {time.monotonic() - started:.0f} s{kept}")
    return 0


def find(cluster: Cluster, job_id: str) -> Job:
    """The job of this id. Raises: DeployError naming the nearest and the last ones."""
    try:
        return _job(cluster.client.get_job_info(job_id))
    except RuntimeError as error:
        raise DeployError(f"{cluster.url} knows no job {job_id}; {_known(cluster, job_id)}") from (
            error
        )
    except OSError as error:
        raise ClusterUnreachable(
            f"{cluster.url} no longer answers ({type(error).__name__}); {job_id} may go on"
        ) from error


def how_to(address: str, job_id: str) -> str:
    """The lines that take a job up again."""
    return (
        f"follow   diccae logs {job_id} --follow --address {address}\n"
        f"stop     diccae stop {job_id} --address {address}"
    )


def stay_with(cluster: Cluster, address: str, job_id: str, *, say: Say, write: Say) -> int:
    """Stream the log of a job to its end. Returns: its exit code; 130 after Ctrl-C."""
    try:
        info = asyncio.run(_stream(cluster, job_id, say, write))
    except KeyboardInterrupt:
        say(f"\ndetached from {job_id}, which goes on\n{how_to(address, job_id)}")
        return INTERRUPTED
    code = _exit_code(info)
    say(f"job      {job_id} {_state(info)}, exit code {code}")
    if info.driver_exit_code is None and info.message:
        say(str(info.message))
    return code


async def _stream(cluster: Cluster, job_id: str, say: Say, write: Say) -> Any:
    """Write the log as it grows. Returns: what the server says of the job once it is over.

    A stream also ends without an error: a proxy closes what is silent for long, and the server when
    it loses the agent of the driver's node. Only the job's own state says that it is over, and the
    log is then read once more: what came after the last stream had ended is in no other place.
    """
    import aiohttp

    log, lost_since = _Once(write), 0.0
    while True:
        try:
            log.begin()
            async for text in cluster.client.tail_job_logs(job_id):
                log.take(text)
                lost_since = 0.0
            info = cluster.client.get_job_info(job_id)
            if _job(info).is_over:
                log.begin()
                log.take(cluster.client.get_job_logs(job_id))
                return info
            lost_since = 0.0
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            now = time.monotonic()
            if not lost_since:
                lost_since = now
                say(f"warning  log lost ({type(error).__name__}), trying again")
            if now - lost_since > _LOST_S:
                raise ClusterUnreachable(
                    f"{cluster.url}: the log of {job_id} was lost for {_LOST_S:.0f} s "
                    f"({_first_line(error)}); the job may go on: {how_to(cluster.url, job_id)}"
                ) from error
        await asyncio.sleep(_TAKE_UP_S)


class _Once:
    """Writes what it has not written before of a text that is told again from its beginning."""

    def __init__(self, write: Say) -> None:
        self._write = write
        self._written = self._position = 0

    def begin(self) -> None:
        """The text begins again."""
        self._position = 0

    def take(self, text: str) -> None:
        """The next piece of it."""
        fresh = text[max(0, self._written - self._position) :]
        self._position += len(text)
        self._written = max(self._written, self._position)
        if fresh:
            self._write(fresh)


def _jobs(cluster: Cluster) -> list[Job]:
    try:
        told = cluster.client.list_jobs()
    except (RuntimeError, OSError) as error:
        raise ClusterUnreachable(
            f"{cluster.url} does not list its jobs ({_first_line(error)})"
        ) from error
    # Without a submission id it is a driver that connected by itself, which nobody submitted.
    found = [_job(info) for info in told if info.submission_id]
    return sorted(found, key=lambda job: job.started_s, reverse=True)


def _job(info: Any) -> Job:
    metadata = dict(info.metadata or {})
    if "diccae.command" not in metadata:
        try:
            words = shlex.split(info.entrypoint)
        except ValueError:  # A shell's text, which need not be a list of words.
            words = []
        starts = [i + 1 for i, word in enumerate(words) if word == "diccae"]
        metadata |= facts(words[starts[0] :]) if starts else {"diccae.command": info.entrypoint}
    return Job(
        str(info.submission_id),
        _state(info),
        metadata["diccae.command"],
        metadata.get("diccae.out", ""),
        (info.start_time or 0) / 1000,
        (info.end_time or 0) / 1000,
        _exit_code(info) if _state(info) in ("SUCCEEDED", "STOPPED", "FAILED") else None,
    )


def _known(cluster: Cluster, job_id: str) -> str:
    known = _jobs(cluster)
    if not known:
        return "it knows none at all: another cluster, or its head was started anew"
    near = difflib.get_close_matches(job_id, [job.id for job in known], _NAMED, cutoff=0.75)
    last = ", ".join(f"{job.id} ({job.command.split(' ')[0]}, {job.state})" for job in known[:3])
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"its last: {last}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _state(info: Any) -> str:
    return str(getattr(info.status, "value", info.status))


def _exit_code(info: Any) -> int:
    """The driver's own code; a signal as shells say it (128 + number)."""
    if _state(info) == "SUCCEEDED":
        return 0
    if _state(info) == "STOPPED":
        return INTERRUPTED
    code = info.driver_exit_code
    if not code:
        return 1
    return 128 + abs(code) if code < 0 and -code in signal.valid_signals() else int(code)
