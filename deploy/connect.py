"""Cluster: the jobs server of a Ray cluster that let us in, and the token it asked for.

Knows nothing of jobs. Invariant: a cluster that asks for no token is sent none, and no message
holds one.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deploy.errors import AccessRefused, ClusterUnreachable, DeployError

_TOKEN_HELP = (
    "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it, or put it in "
    "~/.ray/auth_token. Whoever started the cluster reads it with `ray get-auth-token`; under "
    "KubeRay it is in the secret named by authOptions."
)


class Cluster(NamedTuple):
    """A jobs server that let us in."""

    url: str
    ray_version: str
    headers: dict[str, str]
    client: Any
    """A ray JobSubmissionClient."""


def address_or_default(address: str | None) -> str:
    """The job server to talk to where none is named: Ray's own variable, else a port-forward."""
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"


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


def nodes_of(cluster: Cluster, timeout_s: float = 20.0) -> list[tuple[float, float, bool]]:
    """CPUs and GPUs of each node that is alive, and whether it is labelled for training; those an
    autoscaler would add are not among them.

    Raises: ClusterUnreachable if the server does not say.
    """
    import requests

    url = f"{cluster.url}/api/v0/nodes"
    try:
        answer = requests.get(
            url, headers=cluster.headers, timeout=timeout_s, verify=_authorities()
        )
        answer.raise_for_status()
        rows = answer.json()["data"]["result"]["result"]
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise ClusterUnreachable(
            f"{url} does not list the nodes ({type(error).__name__}: {error}); leave --address out "
            "to compare with this machine"
        ) from error
    found = []
    for row in rows:
        if row["state"] == "ALIVE":
            has, labels = row["resources_total"], row.get("labels") or {}
            sizes = float(has.get("CPU", 0.0)), float(has.get("GPU", 0.0))
            found.append((*sizes, labels.get("diccae.io/role") == "train"))
    return found


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
        return requests.get(
            f"{url}/api/version", headers=headers, timeout=timeout_s, verify=_authorities()
        )
    except requests.exceptions.SSLError as error:
        raise ClusterUnreachable(
            f"{url}: its certificate is not trusted here ({_authorities_said()}). Set "
            f"REQUESTS_CA_BUNDLE to a PEM file with the authority that signed it: {error}"
        ) from error
    except requests.RequestException as error:
        raise ClusterUnreachable(
            f"{url}: no answer ({type(error).__name__}). Is the head running, and the port "
            "forwarded (kubectl port-forward service/NAME-head-svc 8265, or ssh -L 8265:...)?"
        ) from error


def _authorities() -> str | bool:
    """The file or folder of certificate authorities to trust; True: those that come with requests.

    The same for requests and for the stream of a log, of which each would look at one variable.
    """
    named = (os.environ.get(name) for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"))
    return next((value for value in named if value), True)


def _authorities_said() -> str:
    named = _authorities()
    return f"by {named}" if isinstance(named, str) else "REQUESTS_CA_BUNDLE is not set"


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
        return JobSubmissionClient(url, headers=dict(headers), verify=_authorities())


@contextmanager
def _without_ray_address() -> Iterator[None]:
    """Hide what would silently replace the address the user gave."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
