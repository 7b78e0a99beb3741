"""Columns of the clips table and of the feature shards.

Knows nothing of how they are filled. Invariant: a column keeps its meaning and type for as long
as FORMAT stays; no numpy tensor, unsigned or float16 column: any Parquet or Delta reader copes.
"""

import pyarrow as pa

FORMAT = 2
"""What this version writes. 1 had no SPEC_PROPERTY: the spec of the newest row was in force."""
OLDEST_FORMAT = 1
"""Older stores are refused; those from here on open, and the first write makes them FORMAT."""

SOURCE_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("label", pa.string()),
        pa.field("split", pa.string()),
        pa.field("fp_kind", pa.string()),
        pa.field("fp", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("group", pa.string()),
        pa.field("more_labels", pa.string()),
    ]
)
"""A source clip. `fp` is null where there is no file; start_s, end_s where the file is the clip;
`label` where it has none; `group`, what validation is split by, in stores older than the column;
`more_labels`, its classes beside `label` with LABEL_SEPARATOR between them, where it has one."""

LABEL_SEPARATOR = "|"


CLIPS_SCHEMA = pa.schema(
    [
        *SOURCE_SCHEMA,
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("attempts", pa.int32()),
        pa.field("spec_hash", pa.string()),
        pa.field("row_key", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("row", pa.int32()),
        pa.field("run_id", pa.string()),
        pa.field("decoded_at", pa.timestamp("us", tz="UTC")),
        pa.field("seq", pa.int64()),
    ]
)
"""The clips table. Of the rows of a clip and a spec the one with the highest `seq` counts; `status`
is ok, failed or removed (a tombstone). Rows that are removed, or failed as missing, speak for all
specs. A clip is at most once in a commit; all rows of one have its version as seq."""

SPEC_PROPERTY = "diccae.spec_hash"
"""Property of the clips table, versioned with it: hash of the spec in force."""

SHARD_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("row_key", pa.string()),
        pa.field("label", pa.string()),
        pa.field("split", pa.string()),
        pa.field("frames", pa.list_(pa.field("element", pa.binary()))),
        pa.field("frame_ts_ms", pa.list_(pa.field("element", pa.int32()))),
        pa.field("fbank", pa.binary()),
        pa.field("fbank_frames", pa.int32()),
        pa.field("audio_s", pa.float32()),
        pa.field("video_s", pa.float32()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("fps", pa.float32()),
        pa.field("codec", pa.string()),
        pa.field("decoder", pa.string()),
        pa.field("flags", pa.int32()),
    ]
)
"""A feature shard; the spec stands as JSON in the file metadata under SPEC_KEY."""

SPEC_KEY = b"diccae.feature_spec"
ROW_GROUP_ROWS = 64


def split_labels(more_labels: str | None) -> list[str]:
    """The classes that a value of the column `more_labels` holds."""
    return more_labels.split(LABEL_SEPARATOR) if more_labels else []
