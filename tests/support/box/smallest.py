"""The smallest cluster a box can hold, its secrets and its bucket: what the tests of pods share.

Knows nothing of how it is run.
"""

import json
import sys
from pathlib import Path
from typing import Any

from support.box.box import KEYS, Box

from deploy.config import ClusterConfig, GroupConfig

TOKEN = "4f9c" * 16
SECRETS = {"diccae-ray-token": {"auth_token": TOKEN}, "diccae-storage": KEYS}
SMOKE = "/app/configs/vggsound-smoke.yaml"
"""The config, where the image has it."""
STORE = "s3://bucket/store"
INGEST = (
    *("ingest", "--clips", "s3://bucket/clips/clips.csv", "--videos", "s3://bucket/clips/videos"),
    *("--store", STORE, "--config", SMOKE, "--ingest.local-clips", "0"),
)


def group(cpus: int, nodes: int = 1) -> GroupConfig:
    """Nodes without GPUs, as many from the start as ever."""
    return GroupConfig(
        cpus=cpus, memory_gib=3, object_store_frac=0.05, min_nodes=nodes, max_nodes=nodes
    )


_ENV = ClusterConfig().env | {"RAY_worker_niceness": "0"}
"""Nodes have a machine to themselves; here Ray's 15 is behind everything else that runs."""


def config(*command: str, **fields: Any) -> ClusterConfig:
    """A head and one pod for everything else, unless `fields` say otherwise."""
    groups = {"head": group(1), "decode": group(4), "train": group(1, 0)}
    given = {"retries": 0, "env": _ENV, **groups, **fields}
    return ClusterConfig(command=command or INGEST, **given)


_PUT = """
import sys, fsspec
fsspec.filesystem("s3").put(sys.argv[1], "bucket/", recursive=True)
"""
_GET = """
import sys, fsspec
fsspec.filesystem("s3").get("bucket/" + sys.argv[1] + "/", sys.argv[2], recursive=True)
"""
_DIGESTS = """
import hashlib, json, sys, fsspec
fs = fsspec.filesystem("s3")
paths = fs.find("bucket/" + sys.argv[1])
print(json.dumps({path: hashlib.sha256(fs.cat_file(path)).hexdigest() for path in paths}))
"""


def put(box: Box, folder: Path) -> None:
    """Copy a folder of this machine into the bucket."""
    _with_storage(box, _PUT, str(folder))


def get(box: Box, folder: str, to: Path) -> None:
    """Copy a folder of the bucket to this machine."""
    _with_storage(box, _GET, folder, str(to))


def digests(box: Box, folder: str) -> dict[str, str]:
    """Of the files below a folder of the bucket, by their names in it."""
    found: dict[str, str] = json.loads(_with_storage(box, _DIGESTS, folder))
    return {name.removeprefix(f"bucket/{folder}/"): digest for name, digest in found.items()}


def _with_storage(box: Box, script: str, *args: str) -> str:
    done = box.outside([sys.executable, "-c", script, *args], box.storage, 200, **KEYS)
    assert done.returncode == 0, done.stderr
    return done.stdout
