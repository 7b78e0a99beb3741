"""`python -m deploy --out DIR [--config FILE]`: writes the manifests of a cluster.

Knows nothing of what is in them. Invariant: nothing is written unless the config is valid.
"""

import argparse
import sys

import yaml
from pydantic import ValidationError

from deploy.config import ClusterConfig
from deploy.errors import DeployError
from deploy.render import write_manifests


def main(argv: list[str] | None = None) -> int:
    """Render the manifests; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy", description=main.__doc__)
    parser.add_argument("--config", help="YAML of deploy.config.ClusterConfig; default: its own")
    parser.add_argument("--out", required=True, help="folder for the manifests")
    parser.add_argument("command", nargs="*", help="words after `diccae` that the job runs")
    args = parser.parse_args(argv)
    try:
        given: dict[str, object] = {}
        if args.config:
            with open(args.config) as file:
                given = yaml.safe_load(file) or {}
        if args.command:
            given["command"] = args.command
        for path in write_manifests(ClusterConfig.model_validate(given), args.out):
            print(path)
    except (DeployError, ValidationError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
