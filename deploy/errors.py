"""The errors of getting a job to a cluster.

Knows nothing of how they are shown. Invariant: each message says what was found and the next step;
`exit_code` is what the `diccae` command returns.
"""

from typing import ClassVar


class DeployError(Exception):
    """A job that cannot be handed over, for a reason the user can act upon."""

    exit_code: ClassVar[int] = 1


class AccessRefused(DeployError):
    """The cluster wants a token, and there is none or it is wrong."""


class ClusterUnreachable(DeployError):
    """Nothing that speaks the Ray jobs API answers at the address."""


class NotSent(DeployError):
    """A path of the command line that the job would not have, or not keep."""

    exit_code: ClassVar[int] = 2


class PackageRefused(DeployError):
    """The folder cannot be packed, or packs to more than a cluster should be sent."""

    exit_code: ClassVar[int] = 2


class ManifestError(DeployError):
    """A manifest that Kubernetes or KubeRay would refuse."""

    exit_code: ClassVar[int] = 2
