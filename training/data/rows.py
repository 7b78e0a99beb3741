"""RowIndex: the clips of a split at a pinned version of a store, and the 64-bit key of each.

Reads the clips table alone: knows nothing of features, batches or their order. Invariant: the index
depends on the version and the split alone, sorted by (shard, row).

Shapes: N clips.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import FeatureSpec
from pipeline.store.store import Snapshot
from training.errors import TrainingError


def clip_keys(clip_ids: Sequence[str]) -> NDArray[np.uint64]:
    """A stable 64-bit key per clip id, what clustering knows a clip by."""
    digests = b"".join(hashlib.blake2b(c.encode(), digest_size=8).digest() for c in clip_ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


@dataclass(frozen=True)
class RowIndex:
    """The live rows of a split at a pinned version, sorted by (shard, row)."""

    store_uri: str
    spec: FeatureSpec
    shards: list[str]
    classes: list[str]
    clip_ids_N: NDArray[np.object_]
    keys_N: NDArray[np.uint64]
    labels_N: NDArray[np.int64]
    """Position in `classes`; -1 without a label."""
    shards_N: NDArray[np.int32]
    """Position in `shards`."""
    rows_N: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.keys_N)

    def take(self, which: NDArray[Any]) -> "RowIndex":
        """The same index with only the rows `which` (positions or mask)."""
        names = [field.name for field in fields(self) if field.name.endswith("_N")]
        return replace(self, **{name: getattr(self, name)[which] for name in names})


def index_rows(snapshot: Snapshot, split: str, classes: list[str] | None = None) -> RowIndex:
    """The rows of `split` to train or test on.

    Raises: TrainingError if the split has no clip, naming the splits there are.
    """
    table = snapshot.rows(split)
    if table.num_rows == 0:
        found = {
            row["split"]: row["clip_id_count"]
            for row in snapshot.clips.group_by("split")
            .aggregate([("clip_id", "count")])
            .to_pylist()
        }
        raise TrainingError(
            f"{snapshot.uri}: no clip with usable features in split {split!r} at version "
            f"{snapshot.version}; clips by split: {found}. Ingest a CSV with that split, or see "
            f'"diccae store failures --store {snapshot.uri}".'
        )
    names = classes if classes is not None else snapshot.classes
    position = {name: i for i, name in enumerate(names)}
    shard = table["shard"].combine_chunks().dictionary_encode()
    clip_ids = table["clip_id"].to_numpy(zero_copy_only=False)
    keys = clip_keys(clip_ids)
    if len(np.unique(keys)) != len(keys):
        raise TrainingError(f"{snapshot.uri}: two clip ids share a 64-bit key; rename one of them")
    labels = [position.get(label, -1) for label in table["label"].to_pylist()]
    return RowIndex(
        snapshot.uri,
        snapshot.spec,
        shard.dictionary.to_pylist(),
        list(names),
        clip_ids,
        keys,
        np.asarray(labels, np.int64),
        shard.indices.to_numpy(zero_copy_only=False).astype(np.int32),
        pc.cast(table["row"], "int32").to_numpy(),
    )


def with_labels(index: RowIndex, purpose: str) -> RowIndex:
    """The rows that have a label. Raises: TrainingError if none has, naming who needs them."""
    known = index.labels_N >= 0
    if not known.any():
        raise TrainingError(
            f"{purpose} needs labels, and none of the {len(index)} clips of {index.store_uri} it "
            "would use has one. Ingest them with a list that has labels (diccae ingest --clips), "
            "or with --label-from-folder."
        )
    return index if known.all() else index.take(known)
