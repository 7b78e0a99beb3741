"""Checks of what is reached over a network: a token, a store, an MLflow server, a cluster.

Knows nothing of this machine but its environment. Invariant: it reads, and writes nothing.
"""

import importlib.metadata
import os
import urllib.request
from pathlib import Path

from diccae.doctor import child
from diccae.doctor.check import Check, never_raises

_SEARCH = """
import sys
from training.tracking.client import mlflow_client
mlflow_client(sys.argv[1]).search_experiments(max_results=1)
print("ok")
"""
_ANSWER_S = "10"
_SEARCH_S = 120.0
"""Of which importing MLflow may take most."""


@never_raises("ray token", "see the message; unset RAY_AUTH_TOKEN_PATH or name a readable file")
def check_token() -> Check:
    """Whether the token a cluster may ask for is here; a machine without one is no failure."""
    from deploy.connect import find_token

    mode = os.environ.get("RAY_AUTH_MODE", "unset")
    token, source = find_token()
    if token:
        return Check("ray token", True, f"from {source}; RAY_AUTH_MODE {mode}")
    if mode == "token":
        hint = "ray get-auth-token --generate, or set RAY_AUTH_TOKEN"
        return Check("ray token", False, "RAY_AUTH_MODE=token and no token", hint)
    return Check("ray token", True, "none here; needed only for clusters that ask for one")


@never_raises("store", "check the URI and your keys (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)")
def check_store(uri: str) -> Check:
    """The feature store can be opened and its clips table read."""
    from pipeline.store.store import FeatureStore

    snapshot = FeatureStore.open(uri).snapshot()
    rows = snapshot.rows(None)
    return Check(
        "store", True, f"{uri}: version {snapshot.version}, {len(rows)} clips with features"
    )


@never_raises("mlflow", "start it (deploy/mlflow), or leave tracking.uri out for a local file")
def check_mlflow(uri: str) -> Check:
    """The MLflow server answers and lets us in, or the database file can be used."""
    if uri.startswith(("http://", "https://")):
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
            body = answer.read(100).decode(errors="replace").strip()
        if body != "OK":
            hint = "something else answers here: check host and port"
            return Check("mlflow", False, f"{uri}: {body or 'empty answer'}", hint)
        return _check_entry(uri)
    if not uri.startswith("sqlite:///"):
        return Check("mlflow", True, f"{uri}: not tried; MLflow opens it when a run starts")
    file = Path(uri.removeprefix("sqlite:///"))
    # MLflow makes the folders, too.
    there = next(place for place in (file, *file.absolute().parents) if place.exists())
    ok = os.access(there, os.W_OK) and (there == file or there.is_dir())
    state = "exists" if there == file else "will be made"
    hint = "" if ok else f"make {there} writable or choose another tracking.uri"
    return Check("mlflow", ok, f"{file} {state}", hint)


@never_raises(
    "mlflow",
    "let us in: for 'Invalid Host header' start the server with --allowed-hosts naming this host "
    "and port, as deploy/mlflow does; for 401 set MLFLOW_TRACKING_TOKEN or _USERNAME and _PASSWORD",
)
def _check_entry(uri: str) -> Check:
    """What a run asks first: /health is answered also to whom the server refuses all else."""
    child.run(_SEARCH, _SEARCH_S, uri, env={"MLFLOW_HTTP_REQUEST_TIMEOUT": _ANSWER_S})
    return Check("mlflow", True, f"{uri}: answers and lets us in")


@never_raises("cluster", "see the message")
def check_cluster(address: str) -> Check:
    """The job server of a cluster lets us in, and runs this Ray."""
    from deploy.connect import connect

    cluster = connect(address)
    ours = importlib.metadata.version("ray")
    ok = cluster.ray_version == ours
    hint = "" if ok else "use images built from this constraints.txt (deploy/Dockerfile)"
    auth = "token accepted" if cluster.headers else "no token asked"
    return Check(
        "cluster", ok, f"{cluster.url}: Ray {cluster.ray_version}, here {ours}; {auth}", hint
    )
