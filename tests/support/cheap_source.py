"""CheapSource: a folder of text files that an ingest takes for clips, decoded without video or Ray.

The plan, the shards, the commits and the lease are the real ones. Knows nothing of what a test
expects.
"""

import csv
import hashlib
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.ingest import run
from pipeline.store.schema import CLIPS_SCHEMA, SOURCE_SCHEMA
from pipeline.store.shards import ShardWriter

CHEAP_SPECS = [FeatureSpec(n_frames=n, frame_size=16, n_mels=8, fbank_frames=8) for n in (1, 2)]
_SHARD_CLIPS = 3


def outcome(content: str) -> str:
    """What the cheap decoder makes of a file: ok, or the reason it fails with."""
    return {"b": "open_failed", "s": "timeout"}.get(content[0], "ok")


def features(spec_hash: str, clip_id: str, content: str) -> str:
    """The bytes the cheap decoder stores as the first frame."""
    return f"{spec_hash} {clip_id} {content}"


def decode_cheaply(this: run._Run, todo: pa.Table) -> Iterator[pa.Table]:
    """In place of `_Run._decoded`: shards of three clips."""
    rows = todo.to_pylist()
    for begin in range(0, len(rows), _SHARD_CLIPS):
        yield _decode_shard(this, rows[begin : begin + _SHARD_CLIPS], begin)


def _decode_shard(this: run._Run, clips: list[dict[str, Any]], begin: int) -> pa.Table:
    name = f"features/part-{this.run_id}-{begin:06d}-0.parquet"
    writer = ShardWriter(this.store.location, name, this.spec)
    spec_hash = this.spec.spec_hash()
    states = []
    for clip in clips:
        content = Path(clip["uri"]).read_text()
        state = {name: clip[name] for name in SOURCE_SCHEMA.names} | {
            "attempts": clip["attempts"] + 1, "spec_hash": spec_hash, "run_id": this.run_id,
            "decoded_at": datetime.now(UTC), "status": "ok",
        }  # fmt: skip
        if this.config.fingerprint == "sha256":
            state |= {"fp_kind": "sha256", "fp": hashlib.sha256(content.encode()).hexdigest()}
        if (reason := outcome(content)) != "ok":
            states.append(state | {"status": "failed", "reason": reason})
            continue
        key = f"{clip['clip_id']}-{content}-{spec_hash}"
        stored = features(spec_hash, clip["clip_id"], content).encode()
        row = writer.add({"clip_id": clip["clip_id"], "row_key": key, "frames": [stored]})
        states.append(state | {"row_key": key, "shard": name, "row": row})
    if writer.n_rows:
        writer.publish()
    writer.discard()
    return pa.Table.from_pylist(states, CLIPS_SCHEMA)


class CheapSource:
    """Clips `c0 ...`, their manifest and the store they go to."""

    def __init__(self, folder: Path, n_clips: int, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.store = folder, str(folder / "store")
        self.clips = [f"c{i}" for i in range(n_clips)]
        (folder / "videos").mkdir()
        for clip in self.clips:
            self.file(clip).write_text("good")
        self.decoded: list[str] = []
        self.run_id = ""
        self.before_shard: Callable[[], None] = lambda: None
        patch.setattr(run._Run, "_decoded", lambda this, todo: self._decode(this, todo))

    def file(self, clip: str) -> Path:
        return self.folder / "videos" / f"{clip}.mp4"

    def touch(self) -> None:
        """Every file gets a new time, as on another disk."""
        for i, clip in enumerate(self.clips):
            if self.file(clip).exists():
                os.utime(self.file(clip), ns=(10**9 + i, 10**9 + i))

    def _decode(self, this: run._Run, todo: pa.Table) -> Iterator[pa.Table]:
        self.run_id = this.run_id
        for states in decode_cheaply(this, todo):
            self.before_shard()
            self.decoded += states["clip_id"].to_pylist()
            yield states

    def ingest(self, spec: FeatureSpec | None = None, **options: Any) -> run.IngestSummary:
        with (self.folder / "clips.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["clip_id", "uri", "label", "split"])
            writer.writerows([clip, f"{clip}.mp4", "dog", "train"] for clip in self.clips)
        return self._ingest(str(self.folder / "clips.csv"), spec, options)

    def ingest_folder(self, spec: FeatureSpec | None = None, **options: Any) -> run.IngestSummary:
        """Without a list: every file is a clip, named by its path."""
        return self._ingest(None, spec, options)

    def _ingest(
        self, clips: str | None, spec: FeatureSpec | None, options: dict[str, Any]
    ) -> run.IngestSummary:
        self.decoded = []
        return run.ingest(
            clips,
            str(self.folder / "videos"),
            self.store,
            spec,
            IngestConfig(**{"commit_shards": 1, "max_failed_frac": 1.0, **options}),
            start_ray=lambda: None,
            on_progress=lambda progress: None,
        )
