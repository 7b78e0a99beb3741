"""`diccae doctor`: check this machine, the cluster, the store and MLflow."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from diccae.args import Options
from diccae.errors import UsageError


@dataclass(frozen=True)
class DoctorArgs:
    """Each check says what it found and, where it fails, what to do next."""

    store: str | None = None
    """Feature store to reach."""
    tracking_uri: Annotated[str | None, tyro.conf.arg(aliases=["--mlflow-uri"])] = None
    """MLflow server to reach."""
    address: str | None = None
    """Ray job server to reach."""
    config: str | None = None
    """YAML config: whether its run makes sense, and fits the store, the card and the cluster."""
    init: str | None = None
    """Weights that the config's run would start from, as for `pretrain --init`."""
    json: bool = False
    """Print the checks as one JSON line."""


OPTIONS = Options("doctor", DoctorArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns: 1 if a check failed."""
    args = OPTIONS.parse(argv)
    if args.init is not None and args.config is None:
        raise UsageError(f"--init {args.init} is checked against a run: give its --config")
    from diccae.doctor.examine import run_doctor

    checks = run_doctor(args.store, args.tracking_uri, args.address, args.config, args.init)
    if args.json:
        print(json.dumps([check._asdict() for check in checks]))
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<16}  {check.detail}")
            if not check.ok:
                print(f"{'':24}{check.hint}")
    return 0 if all(check.ok for check in checks) else 1
