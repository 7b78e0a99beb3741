"""RowIndex: the clips of a split at a pinned version of a store, and the 64-bit key of each.

Reads the clips table alone: knows nothing of features, batches or their order. Invariant: the index
depends on the version and the split alone, sorted by (shard, row).

Shapes: N clips, L labels of the clip that has most.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import FeatureSpec
from pipeline.store.schema import split_labels
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
    labels_NL: NDArray[np.int32]
    """Positions in `classes` of a clip's labels, the first one first; then, or without a label, -1.
    L is 1 but where clips have several labels."""
    shards_N: NDArray[np.int32]
    """Position in `shards`."""
    rows_N: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.keys_N)

    @property
    def labels_N(self) -> NDArray[np.int64]:
        """A clip's first label, position in `classes`; -1 without a label."""
        return self.labels_NL[:, 0].astype(np.int64)

    @property
    def has_several(self) -> bool:
        """Whether some clip has more than one label."""
        return bool((self.labels_NL[:, 1:] >= 0).any())

    def take(self, which: NDArray[Any]) -> "RowIndex":
        """The same index with only the rows `which` (positions or mask)."""
        names = [field.name for field in fields(self) if field.name.endswith(("_N", "_NL"))]
        return replace(self, **{name: getattr(self, name)[which] for name in names})


def index_rows(snapshot: Snapshot, split: str, classes: list[str] | None = None) -> RowIndex:
    """The rows of `split` to train or test on.

    Raises: TrainingError if the split has no clip, naming the splits there are, or if the keys of
        two clips are the same.
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
    # By sorting: `np.unique` hashes, which took 80 times as long for two million random keys.
    ordered = np.sort(keys)
    if (ordered[1:] == ordered[:-1]).any():
        raise TrainingError(f"{snapshot.uri}: two clip ids share a 64-bit key; rename one of them")
    return RowIndex(
        snapshot.uri,
        snapshot.spec,
        shard.dictionary.to_pylist(),
        list(names),
        clip_ids,
        keys,
        _labels(table, position),
        shard.indices.to_numpy(zero_copy_only=False).astype(np.int32),
        pc.cast(table["row"], "int32").to_numpy(),
    )


def _labels(table: pa.Table, position: dict[str, int]) -> NDArray[np.int32]:
    """See `RowIndex.labels_NL`: a label that is no class is left out."""
    first_N = [position.get(label, -1) for label in table["label"].to_pylist()]
    labels_NL = np.array(first_N, np.int32)[:, None]
    several = np.flatnonzero(pc.is_valid(table["more_labels"]).to_numpy())
    if not len(several):
        return labels_NL
    # Only rows that have more labels are looked at: most stores have none.
    more = [split_labels(text) for text in table["more_labels"].take(several).to_pylist()]
    widest = max(map(len, more))
    labels_NL = np.pad(labels_NL, ((0, 0), (0, widest)), constant_values=-1)
    for row, names in zip(several.tolist(), more, strict=True):
        labels = [labels_NL[row, 0], *(position.get(name, -1) for name in names)]
        known = [label for label in labels if label >= 0]
        labels_NL[row] = known + [-1] * (1 + widest - len(known))
    return labels_NL


def few_of_each_class(labels_N: NDArray[np.integer], per_class: int) -> NDArray[np.intp]:
    """Sorted positions of `per_class` rows of each class, or all it has; the same in every run.

    Drawn by chance from rows in their order, which is that of the store, so that pretraining from
    few labels and the probe from few labels see the same ones.
    """
    shuffled = np.random.default_rng(0).permutation(len(labels_N))
    chosen = [shuffled[labels_N[shuffled] == label][:per_class] for label in np.unique(labels_N)]
    return np.sort(np.concatenate(chosen))


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
