"""What readers of a store asked the S3 API before them (`support.unsteady`) for."""

from support.unsteady import Unsteady

from pipeline.store import cached, shards


def asked_of_shards() -> list[int]:
    """Bytes of each answer about a shard since the last time."""
    sizes = [n_bytes for path, n_bytes in Unsteady.asked if "/features/" in path]
    Unsteady.asked.clear()
    return sizes


def forget() -> None:
    """As a process that was just started, and has asked for nothing."""
    shards._footers._kept.clear()
    cached._folder.cache_clear()
    Unsteady.asked.clear()
