"""`python -m deploy --out DIR [--config FILE]`: writes the manifests of a cluster.

The part of `diccae render` that imports none of the other packages: knows nothing of what the
command needs, so it does not compare that with the groups. Invariant: nothing is written unless the
config is valid.
"""

import argparse
import sys

from deploy.config import read_config
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
        for path in write_manifests(read_config(args.config, args.command), args.out):
            print(path)
    except (DeployError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
