"""`diccae jobs`: what runs on a cluster, and what ran there."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from diccae.args import Options
from diccae.screen import clock, say, table
from pipeline.passwords import without_passwords

if TYPE_CHECKING:
    from deploy.jobs import Job


@dataclass(frozen=True)
class JobsArgs:
    """List the jobs of a cluster, newest first."""

    address: str | None = None
    """The cluster's job server; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    last: int = 20
    """How many to list."""
    runs: bool = False
    """Look into their run folders, too, where this machine can read them: attempt, MLflow run."""
    json: bool = False
    """Print one JSON line per job."""


OPTIONS = Options("jobs", JobsArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    from deploy.connect import address_or_default
    from deploy.jobs import jobs

    address = address_or_default(args.address)
    found = jobs(address)[: args.last]
    known = {job.id: _of_its_run(job) if args.runs else {} for job in found}
    if args.json:
        for job in found:
            command = without_passwords(job.command)
            print(json.dumps({**job._replace(command=command)._asdict(), **known[job.id]}))
    elif found:
        print(_table(found, known))
    else:
        say(f"no jobs on {address}; hand one over with diccae submit")
    return 0


def _table(found: Sequence["Job"], known: dict[str, dict[str, Any]]) -> str:
    columns = {"job": [job.id for job in found], "state": [job.state for job in found]}
    columns["since"] = [_when(job.started_s) for job in found]
    columns["took"] = [
        clock((job.ended_s or time.time()) - job.started_s) if job.started_s else "--"
        for job in found
    ]
    columns["exit"] = ["" if job.exit_code is None else str(job.exit_code) for job in found]
    for name in ("attempt", "mlflow"):
        if any(known.values()):
            columns[name] = [str(known[job.id].get(name, "")) for job in found]
    columns["run"] = [job.out for job in found]
    columns["command"] = [without_passwords(job.command) for job in found]
    return table(list(columns), list(zip(*columns.values(), strict=True)))


def _when(time_s: float) -> str:
    if not time_s:
        return "--"
    return datetime.fromtimestamp(time_s).astimezone().strftime("%Y-%m-%d %H:%M")


def _of_its_run(job: "Job") -> dict[str, Any]:
    """The attempt this job is and its MLflow run, by the record of its run folder."""
    from pipeline.errors import StoreError
    from pipeline.storage import Location, storage_failures_ignored

    if "://" not in job.out and not job.out.startswith("/"):
        return {}  # Nowhere, or below the folder of a node that the job was unpacked in.
    record: dict[str, Any] = {}
    try:
        with storage_failures_ignored():
            record = json.loads(Location(job.out).read_bytes("run.json"))
    except (StoreError, ValueError):
        return {}
    # Only the newest attempt is in it: which number an earlier job of the folder had, nobody knows.
    attempt = {"attempt": record["attempt"]} if record.get("job") == job.id else {}
    mlflow = record.get("mlflow") or {}
    return {**attempt, **({"mlflow": _link(**mlflow)} if mlflow.get("run_id") else {})}


def _link(uri: str, run_id: str) -> str:
    shown = without_passwords(uri).rstrip("/")
    return f"{shown}/#/runs/{run_id}" if uri.startswith("http") else run_id
