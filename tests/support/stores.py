"""What is in a feature store, and one without clips: rows of noise, written as an ingest would.

Knows nothing of decoding. Invariant: equal arguments give equal features.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import FeatureSpec
from pipeline.decode.payload import encode_jpeg, fbank_payload
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.shards import ShardWriter, read_rows
from pipeline.store.store import FeatureStore

N_SHARDS = 2


def noise_store(
    folder: Path | str,
    spec: FeatureSpec,
    n_clips: int,
    labelled: bool = True,
    more: str | None = None,
    *,
    shards: int = N_SHARDS,
    together: bool = False,
) -> FeatureStore:
    """n clips of the train split, of classes "class 0" to "class 3" (and of `more`) or of none, in
    two shards or so many; those of a class mixed with others, or `together`."""
    store = FeatureStore.create(str(folder), spec)
    rng = np.random.default_rng(0)
    rows = []
    for shard in range(shards):
        writer = ShardWriter(store.location, f"features/part-run-{shard:06d}-0.parquet", spec)
        for number in range(n_clips // shards):
            clip_id = f"clip{shard}{number:06d}_000000"
            size = (spec.n_frames, spec.frame_size, spec.frame_size, 3)
            images = rng.integers(0, 256, size, np.uint8)
            noise = rng.normal(size=(spec.fbank_frames, spec.n_mels))
            fbank, n_valid = fbank_payload(noise, spec)
            features: dict[str, Any] = {
                "frames": [encode_jpeg(image, 95) for image in images],
                "frame_ts_ms": [0] * spec.n_frames,
                "fbank": fbank,
                "fbank_frames": n_valid,
            }
            of_class = number * 4 * shards // n_clips if together else number % 4
            label = f"class {of_class}" if labelled else None
            same: dict[str, Any] = {"clip_id": clip_id, "row_key": f"key-{clip_id}", "label": label}
            same["split"] = "train"
            same["uri"] = f"/nowhere/{clip_id}.mp4"
            state = {
                "status": "ok",
                "more_labels": more,
                "shard": writer.name,
                "spec_hash": spec.spec_hash(),
            }
            rows.append({**same, **state, "row": writer.add({**same, **features})})
        writer.publish()
    store.append(pa.Table.from_pylist(rows, CLIPS_SCHEMA), {})
    return store


def contents(store: str) -> list:
    """Every live row with its payload, by clip."""
    rows = FeatureStore.open(store).snapshot().rows(None)
    columns = ["clip_id", "row_key", "frames", "frame_ts_ms", "fbank"]
    found = []
    for shard in pc.unique(rows["shard"]).to_pylist():
        mine = rows.filter(pc.equal(rows["shard"], shard))
        table = read_rows(store, shard, mine["row"].to_numpy(), columns)
        assert table["clip_id"].to_pylist() == mine["clip_id"].to_pylist()
        found += [tuple(map(repr, row.values())) for row in table.to_pylist()]
    return sorted(found)
