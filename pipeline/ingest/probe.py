"""How many clips of a plan have a timeline that a frame-counting decoder gets wrong?

Reads containers without decoding, in the decode child. Invariant: a broken file is counted, never
raised.
"""

from collections import Counter
from typing import Any

import av
import pyarrow as pa

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.decode.sandbox import Sandbox
from pipeline.decode.timeline import read_timeline
from pipeline.reasons import Reason, Rejected
from pipeline.source.fetch import fetch_all
from pipeline.source.tar_parts import part_of


def probe_clip(path: str, start_s: float | None, spec: FeatureSpec) -> str:
    """Why the timeline is unclean; empty if it is clean.

    Raises: Rejected.
    """
    try:
        with av.open(path, metadata_errors="replace") as container:
            return read_timeline(container, start_s or 0.0, spec.duration_s).unclean_because()
    except av.FFmpegError as error:
        raise Rejected(Reason.OPEN_FAILED, error.strerror or str(error)) from error


def probe_timelines(clips: pa.Table, spec: FeatureSpec, config: IngestConfig) -> dict[str, Any]:
    """Probe clips (SOURCE_SCHEMA) that are files of their own; those in tar parts are left out.

    Returns: {"clean": n, "unclean": n, "unreadable": n, "in_parts": n, "examples": {id: why}}.
    """
    counts: Counter[str] = Counter(clean=0, unclean=0, unreadable=0, in_parts=0)
    examples: dict[str, str] = {}
    rows = clips.to_pylist()
    files = [clip for clip in rows if part_of(clip["uri"]) is None]
    counts["in_parts"] = len(rows) - len(files)
    sandbox = Sandbox(
        "pipeline.ingest.probe:probe_clip",
        timeout_s=config.timeout_s,
        max_calls=config.child_clips,
        max_memory_mb=config.child_memory_mb,
    )
    try:
        for fetched in fetch_all(files, config):
            try:
                if fetched.rejected:
                    raise fetched.rejected
                sandbox.submit(fetched.path, fetched.clip["start_s"], spec)
                because = sandbox.result()
            except Rejected:
                counts["unreadable"] += 1
                continue
            finally:
                fetched.release()
            counts["unclean" if because else "clean"] += 1
            if because and len(examples) < 5:
                examples[fetched.clip["clip_id"]] = because
    finally:
        sandbox.close()
    return {**counts, "examples": examples}
