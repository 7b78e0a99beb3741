"""Hands a `diccae` command to a Ray cluster over the jobs API, and stays with it to its end.

Knows nothing of what the command does. The code of the working directory travels as one package,
the dependencies are the cluster's own.
Invariant: what is returned is the job's own exit code; leaving (Ctrl-C) never stops the job.
"""

import asyncio
import logging
import os
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from deploy.errors import AccessRefused, ClusterUnreachable, DeployError
from deploy.package import Selection, megabytes, select_files, write_zip

Say = Callable[[str], None]

INTERRUPTED = 130
_POLL_S = 0.2
_LOST_LOG_S = 60.0
_TOKEN_HELP = (
    "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it, or put it in "
    "~/.ray/auth_token. Whoever started the cluster reads it with `ray get-auth-token`; under "
    "KubeRay it is in the secret named by authOptions."
)


# The job runs in the environment Ray itself runs in, which need not be the `python` on its PATH: a
# head may have been started as VENV/bin/ray. The shell's parent is Ray's job supervisor, and the
# libraries mapped into it say where that environment is.
_FIND_PYTHON = (
    r"""home=$(sed -n 's|.* \(/.*\)/lib/python[0-9.]*/site-packages/ray/_raylet.so$|\1|p' """
    r""""/proc/$PPID/maps" 2>/dev/null | head -n 1); python="${home:+$home/bin/}python";"""
)


class Cluster(NamedTuple):
    """A jobs server that let us in."""

    url: str
    ray_version: str
    headers: dict[str, str]
    client: Any
    """A ray JobSubmissionClient."""


def connect(address: str, timeout_s: float = 20.0) -> Cluster:
    """Reach the jobs server at `address` (http://HOST:8265), with the token only if it wants one.

    Raises: ClusterUnreachable if nothing answers, AccessRefused for no token or a wrong one.
    """
    url = _http_url(address)
    headers: dict[str, str] = {}
    answer = _get_version(url, headers, timeout_s)
    if answer.status_code in (401, 403):
        token, source = find_token()
        if not token:
            raise AccessRefused(f"{url} wants a token, and there is none here. {_TOKEN_HELP}")
        headers = {"Authorization": f"Bearer {token}"}
        answer = _get_version(url, headers, timeout_s)
        if answer.status_code in (401, 403):
            raise AccessRefused(f"{url} refuses the token of {source}. {_TOKEN_HELP}")
    try:
        answer.raise_for_status()
        version = str(answer.json()["ray_version"])
    except (OSError, ValueError, KeyError) as error:
        raise ClusterUnreachable(
            f"{url} answers HTTP {answer.status_code}, but not as a Ray jobs server ({error}); "
            "the address is that of the dashboard, port 8265 by default"
        ) from error
    return Cluster(url, version, headers, _job_client(url, headers))


def nodes_of(cluster: Cluster, timeout_s: float = 20.0) -> list[tuple[float, float]]:
    """CPUs and GPUs of each node that is alive; those an autoscaler would add are not among them.

    Raises: ClusterUnreachable if the server does not say.
    """
    import requests

    url = f"{cluster.url}/api/v0/nodes"
    try:
        answer = requests.get(url, headers=cluster.headers, timeout=timeout_s)
        answer.raise_for_status()
        rows = answer.json()["data"]["result"]["result"]
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise ClusterUnreachable(
            f"{url} does not list the nodes ({type(error).__name__}: {error}); leave --address out "
            "to compare with this machine"
        ) from error
    alive = [row["resources_total"] for row in rows if row["state"] == "ALIVE"]
    return [(float(has.get("CPU", 0.0)), float(has.get("GPU", 0.0))) for has in alive]


def _http_url(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    if not separator:
        return f"http://{address}".rstrip("/")
    if scheme not in ("http", "https"):
        raise DeployError(
            f"{address}: jobs go over HTTP, not {scheme}://; give the dashboard's address, "
            f"http://{rest.split(':')[0]}:8265"
        )
    return address.rstrip("/")


def _get_version(url: str, headers: dict[str, str], timeout_s: float) -> Any:
    import requests

    try:
        return requests.get(f"{url}/api/version", headers=headers, timeout=timeout_s)
    except requests.RequestException as error:
        raise ClusterUnreachable(
            f"{url}: no answer ({type(error).__name__}). Is the head running, and the port "
            "forwarded (kubectl port-forward service/NAME-head-svc 8265, or ssh -L 8265:...)?"
        ) from error


def find_token() -> tuple[str, str]:
    """The cluster token and where it came from, in Ray's own order; ("", "") if there is none.

    Raises: AccessRefused if RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Path(named).expanduser().read_text().strip(), named
        except OSError as error:
            raise AccessRefused(f"RAY_AUTH_TOKEN_PATH={named}: {error.strerror}") from error
    default = Path.home() / ".ray" / "auth_token"
    if default.is_file():
        return default.read_text().strip(), str(default)
    return "", ""


def _job_client(url: str, headers: dict[str, str]) -> Any:
    from ray.job_submission import JobSubmissionClient

    for chatty in ("dashboard_sdk", "job.sdk"):  # their notices would stand between the log's lines
        logging.getLogger(f"ray.dashboard.modules.{chatty}").setLevel(logging.WARNING)
    with _without_ray_address():
        return JobSubmissionClient(url, headers=dict(headers))


@contextmanager
def _without_ray_address() -> Iterator[None]:
    """Hide what would silently replace the address the user gave."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def submit(
    address: str,
    args: Sequence[str],
    *,
    working_dir: str | Path = ".",
    env: Mapping[str, str] | None = None,
    excludes: Sequence[str] = (),
    wait: bool = True,
    say: Say,
    write: Say,
) -> int:
    """Run `python -m diccae <args>` on the cluster; the job's own exit code.

    Args: env: variables of the job; they can be read by anyone who can see the job.
        say: gets lines about the job. write: gets the job's own output, as it comes.
    Returns: the exit code; 0 if `wait` is false; 130 if interrupted (the job goes on).
    """
    if not args:
        raise DeployError("nothing to run: diccae submit --address URL -- pretrain --config FILE")
    selection = select_files(Path(working_dir), excludes)
    cluster = connect(address)
    _compare_versions(cluster, say)
    command = shlex.join(["-m", "diccae", *args])
    with tempfile.TemporaryDirectory(prefix="diccae-package-") as scratch:
        package = Path(scratch) / "package.zip"
        packed = write_zip(selection, package)
        say(f"package  {len(selection.files)} files, {megabytes(packed)} of {working_dir}")
        if selection.left_out:
            say(f"left out {_summary(selection.left_out)}")
        for note in _paths_of_this_machine(args, Path(working_dir), selection):
            say(note)
        job_id = _hand_over(cluster, command, package, env or {})
    say(f"job      {job_id} on {cluster.url} (Ray {cluster.ray_version}): python {command}")
    if not wait:
        say(_how_to(address, job_id))
        return 0
    return _follow(cluster, address, job_id, say, write)


def _hand_over(cluster: Cluster, command: str, package: Path, env: Mapping[str, str]) -> str:
    """Upload the package and start `python <command>` in it; the id of the job."""
    entrypoint = f'{_FIND_PYTHON} exec "$python" {command}'
    env_vars = {"PYTHONUNBUFFERED": "1", **env}
    runtime_env = {"working_dir": str(package), "env_vars": env_vars}
    try:
        return str(cluster.client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
    except (RuntimeError, OSError) as error:
        raise DeployError(f"{cluster.url} did not take the job: {error}") from error


def _compare_versions(cluster: Cluster, say: Say) -> None:
    import ray

    if cluster.ray_version != ray.__version__:
        say(
            f"warning  the cluster runs Ray {cluster.ray_version}, this machine {ray.__version__}: "
            "the job runs with the cluster's; use an image of the same constraints.txt"
        )


def _summary(left_out: list[tuple[str, str]], most: int = 12) -> str:
    # Credentials are all named, and first: who needs one of them must see that it does not travel.
    order = sorted(left_out, key=lambda item: "credentials" not in item[1])
    most = max(most, sum("credentials" in why for _, why in left_out))
    names = [name if why == "ignored" else f"{name} ({why})" for name, why in order]
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _paths_of_this_machine(
    args: Sequence[str], folder: Path, selection: Selection
) -> Iterator[str]:
    """Arguments that name files which do not travel with the code."""
    sent = {parent for file in selection.files for parent in (file.name, *_parents(file.name))}
    for arg in args:
        value = arg.partition("=")[2] if arg.startswith("--") else arg
        path = folder / value
        if not value or "://" in value or not path.exists():
            continue
        if os.path.isabs(value):
            yield f"note     {value} is a path of this machine: the nodes must have it there too"
        elif os.path.normpath(value) not in sent:
            yield f"warning  {value} is not sent with the code: put it where the nodes can read it"


def _parents(name: str) -> Iterator[str]:
    return (str(parent) for parent in PurePosixPath(name).parents)


def _how_to(address: str, job_id: str) -> str:
    return (
        f"follow   diccae submit --address {address} --follow {job_id}\n"
        f"stop     diccae submit --address {address} --stop {job_id}"
    )


def follow(address: str, job_id: str, *, say: Say, write: Say) -> int:
    """Attach to a job that was submitted before, from its first line; its exit code."""
    cluster = connect(address)
    _job_info(cluster, job_id)
    return _follow(cluster, address, job_id, say, write)


def stop(address: str, job_id: str, *, say: Say, timeout_s: float = 60.0) -> int:
    """Stop a job and wait until it has ended; 0 if it is over."""
    cluster = connect(address)
    _job_info(cluster, job_id)
    cluster.client.stop_job(job_id)
    deadline = time.monotonic() + timeout_s
    while not (info := _job_info(cluster, job_id)).status.is_terminal():
        if time.monotonic() > deadline:
            raise DeployError(f"{job_id} is still {info.status} {timeout_s:.0f} s after the stop")
        time.sleep(_POLL_S)
    say(f"job      {job_id} is {info.status}")
    return 0


def _job_info(cluster: Cluster, job_id: str) -> Any:
    try:
        return cluster.client.get_job_info(job_id)
    except RuntimeError as error:
        raise DeployError(f"{cluster.url} knows no job {job_id}: {error}") from error
    except OSError as error:
        raise ClusterUnreachable(
            f"{cluster.url} no longer answers ({type(error).__name__}); {job_id} may go on"
        ) from error


def _follow(cluster: Cluster, address: str, job_id: str, say: Say, write: Say) -> int:
    try:
        asyncio.run(_stream(cluster, job_id, say, write))
        info = _job_info(cluster, job_id)
        while not info.status.is_terminal():
            time.sleep(_POLL_S)
            info = _job_info(cluster, job_id)
    except KeyboardInterrupt:
        say(f"\ndetached from {job_id}, which goes on\n{_how_to(address, job_id)}")
        return INTERRUPTED
    code = _exit_code(info)
    say(f"job      {job_id} {info.status}, exit code {code}")
    if info.driver_exit_code is None and info.message:
        say(str(info.message))
    return code


async def _stream(cluster: Cluster, job_id: str, say: Say, write: Say) -> None:
    """Write the log as it grows; a lost connection is taken up where it broke."""
    import aiohttp

    seen, lost_since = 0, 0.0
    while True:
        position = 0
        try:
            async for text in cluster.client.tail_job_logs(job_id):
                fresh = text[max(0, seen - position) :]
                position += len(text)
                seen, lost_since = max(seen, position), 0.0
                if fresh:
                    write(fresh)
            return
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            now = time.monotonic()
            lost_since = lost_since or now
            if now - lost_since > _LOST_LOG_S:
                raise ClusterUnreachable(
                    f"{cluster.url}: the log of {job_id} was lost for {_LOST_LOG_S:.0f} s ({error})"
                ) from error
            if now == lost_since:
                say(f"warning  log lost ({type(error).__name__}), trying again")
            await asyncio.sleep(1.0)


def _exit_code(info: Any) -> int:
    """The driver's own code; a signal as shells say it (128 + number)."""
    status = str(getattr(info.status, "value", info.status))
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return INTERRUPTED
    code = info.driver_exit_code
    if not code:
        return 1
    return 128 + abs(code) if code < 0 and -code in signal.valid_signals() else int(code)
