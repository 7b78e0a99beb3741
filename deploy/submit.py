"""Hands a `diccae` command to a Ray cluster over the jobs API, and stays with it to its end.

Knows nothing of what the command does. The code of the working directory travels as one package,
the dependencies are the cluster's own.
Invariant: what is returned is the job's own exit code; leaving (Ctrl-C) never stops the job.
"""

import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from deploy.command_line import values_of
from deploy.connect import Cluster, connect
from deploy.errors import DeployError, NotSent
from deploy.jobs import Say, facts, how_to, stay_with
from deploy.package import Selection, megabytes, select_files, write_zip

_STOP_WAIT_S = 120
"""Between the signal that asks a job to end and the one that ends it. Ray's own 3 s are less than
a large checkpoint takes to be written."""

# The job runs in the environment Ray itself runs in, which need not be the `python` on its PATH: a
# head may have been started as VENV/bin/ray. The shell's parent is Ray's job supervisor, and the
# libraries mapped into it say where that environment is.
_FIND_PYTHON = (
    r"""home=$(sed -n 's|.* \(/.*\)/lib/python[0-9.]*/site-packages/ray/_raylet.so$|\1|p' """
    r""""/proc/$PPID/maps" 2>/dev/null | head -n 1); python="${home:+$home/bin/}python";"""
)


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
    _refuse_what_goes_with_the_job(args, selection)
    cluster = connect(address)
    _compare_versions(cluster, say)
    with tempfile.TemporaryDirectory(prefix="diccae-package-") as scratch:
        package = Path(scratch) / "package.zip"
        packed = write_zip(selection, package)
        say(f"package  {len(selection.files)} files, {megabytes(packed)} of {working_dir}")
        if selection.left_out:
            say(f"left out {_summary(selection.left_out)}")
        for note in _paths_of_this_machine(args, Path(working_dir), selection):
            say(note)
        job_id = _hand_over(cluster, args, package, env or {})
    say(
        f"job      {job_id} on {cluster.url} (Ray {cluster.ray_version}): diccae {shlex.join(args)}"
    )
    if not wait:
        say(how_to(address, job_id))
        return 0
    return stay_with(cluster, address, job_id, say=say, write=write)


def preview(
    args: Sequence[str], *, working_dir: str | Path = ".", excludes: Sequence[str] = (), write: Say
) -> int:
    """Write what `submit` would send, file by file, what it would leave out and why, and the
    command; no cluster is asked. Returns: 0. Raises: as submit does before it connects."""
    selection = select_files(Path(working_dir), excludes)
    _refuse_what_goes_with_the_job(args, selection)
    for file in selection.files:
        write(f"send      {file.name}  {file.size:,} bytes\n")
    for name, why in selection.left_out:
        write(f"leave out {name}  {why}\n")
    write(
        f"package   {len(selection.files):,} files, {selection.size:,} bytes before compression, "
        f"of {working_dir}; {len(selection.left_out):,} files and folders left out\n"
    )
    for note in _paths_of_this_machine(args, Path(working_dir), selection):
        write(f"{note}\n")
    write(f"command   diccae {shlex.join(args)}\n")
    return 0


def _hand_over(cluster: Cluster, args: Sequence[str], package: Path, env: Mapping[str, str]) -> str:
    """Upload the package and start the command in it; the id of the job."""
    entrypoint = f'{_FIND_PYTHON} exec "$python" {shlex.join(["-m", "diccae", *args])}'
    waits = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}
    runtime_env = {
        "working_dir": str(package), "env_vars": {"PYTHONUNBUFFERED": "1", **waits, **env},
    }  # fmt: skip
    try:
        submitted = cluster.client.submit_job(
            entrypoint=entrypoint, runtime_env=runtime_env, metadata=facts(args)
        )
        return str(submitted)
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


def _refuse_what_goes_with_the_job(args: Sequence[str], selection: Selection) -> None:
    """Refuse what the job would write into its copy of the code, which Ray removes, and which is
    another one as soon as a file has changed, and a store that it would not find there.

    Raises: NotSent.
    """
    sent = _sent(selection)
    for option in ("--out", "--store"):
        for path in values_of(args, option):
            if "://" in path or os.path.isabs(path):
                continue
            if option == "--store" and args[0] != "ingest" and os.path.normpath(path) in sent:
                continue
            raise NotSent(
                f"{option} {path}: a folder of the job's own copy of the code, which is gone when "
                "the job is; name a bucket (s3://...), or a whole path that all nodes reach"
            )


def _sent(selection: Selection) -> set[str]:
    return {parent for file in selection.files for parent in (file.name, *_parents(file.name))}


def _paths_of_this_machine(
    args: Sequence[str], folder: Path, selection: Selection
) -> Iterator[str]:
    """Arguments that name files which do not travel with the code."""
    sent = _sent(selection)
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
