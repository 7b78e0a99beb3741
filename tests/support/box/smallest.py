"""The smallest cluster a box can hold, and its secrets: what the tests of pods share.

Knows nothing of how it is run.
"""

from typing import Any

from support.box.box import KEYS

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


def config(*command: str, **fields: Any) -> ClusterConfig:
    """A head and one pod for everything else, unless `fields` say otherwise."""
    groups = {"head": group(1), "decode": group(4), "train": group(1, 0)}
    return ClusterConfig(command=command or INGEST, **{"retries": 0, **groups, **fields})
