"""Clips as pictures: the middle frame, straight from the store's JPEG, and the fbank in colour.

Knows nothing of what is shown or why. Invariant: each shard is read once a call, and a clip that
the pinned version does not hold is simply not in the answer.

Shapes: T valid fbank frames, M mel bins.
"""

import base64
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.decode.payload import fbank_array
from pipeline.store.store import FeatureStore, Snapshot, read_rows
from training.data.rows import clip_keys

_READERS = 8
_INK = np.array([[13, 8, 34], [87, 21, 109], [187, 55, 84], [249, 142, 9], [252, 253, 191]], float)
"""Five colours from silence to loud, even in lightness."""


class Pictures:
    """A pinned version of a store, as something to look at."""

    def __init__(self, store_uri: str, version: int | None) -> None:
        """Raises: StoreError (pipeline) if there is no such store or version."""
        self._snapshot: Snapshot = FeatureStore.open(store_uri).snapshot(version)
        rows = self._snapshot.rows(None)
        ids, labels = rows["clip_id"].to_pylist(), rows["label"].to_pylist()
        shards, places = rows["shard"].to_pylist(), rows["row"].to_pylist()
        self._place_of = dict(zip(ids, zip(shards, places, strict=True), strict=True))
        self.label_of: dict[str, str] = {i: n or "" for i, n in zip(ids, labels, strict=True)}
        self.splits: dict[str, int] = {}
        for split in rows["split"].to_pylist():
            self.splits[split or "none"] = self.splits.get(split or "none", 0) + 1

    @property
    def version(self) -> int:
        """The version that is read."""
        return self._snapshot.version

    @property
    def digest(self) -> str:
        """Digest of the data of that version."""
        return self._snapshot.digest

    def by_key(self) -> dict[int, tuple[str, str]]:
        """Clip id and label by the key that clustering knows a clip by."""
        ids = list(self.label_of)
        keys = clip_keys(ids)
        return {int(k): (i, self.label_of[i]) for k, i in zip(keys, ids, strict=True)}

    def frames(self, clip_ids: Iterable[str]) -> dict[str, str]:
        """The middle frame of each clip that is there, as a `data:` URI."""
        return self._read(clip_ids, ["frames"], lambda row: row["frames"][len(row["frames"]) // 2])

    def spectrograms(self, clip_ids: Iterable[str]) -> dict[str, str]:
        """The fbank of each clip that is there, low tones at the bottom, as a `data:` URI."""
        spec = self._snapshot.spec

        def draw(row: dict[str, Any]) -> bytes:
            fbank_TM = fbank_array(row["fbank"], spec)[: max(row["fbank_frames"] or 0, 1)]
            picture = colours(fbank_TM.astype(np.float32))
            return bytes(simplejpeg.encode_jpeg(picture, quality=85))

        return self._read(clip_ids, ["fbank", "fbank_frames"], draw)

    def _read(
        self, clip_ids: Iterable[str], columns: list[str], draw: Callable[[dict[str, Any]], bytes]
    ) -> dict[str, str]:
        by_shard: dict[str, list[tuple[int, str]]] = {}
        for clip_id in set(clip_ids) & self._place_of.keys():
            shard, row = self._place_of[clip_id]
            by_shard.setdefault(shard, []).append((row, clip_id))

        def read_shard(shard: str) -> dict[str, str]:
            places = sorted(by_shard[shard])
            rows = np.array([row for row, _ in places], dtype=np.int64)
            table = read_rows(self._snapshot.uri, shard, rows, columns)
            found = zip(places, table.to_pylist(), strict=True)
            return {clip_id: _data_uri(draw(row)) for (_, clip_id), row in found}

        with ThreadPoolExecutor(_READERS) as readers:
            return {c: uri for part in readers.map(read_shard, by_shard) for c, uri in part.items()}


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def colours(fbank_TM: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Log-mel levels between their 2nd and 99th percentile as uint8 [M, T, 3], mel 0 last."""
    low, high = np.percentile(fbank_TM, [2, 99])
    level_MT = np.clip((fbank_TM.T[::-1] - low) / max(high - low, 1e-6), 0, 1)
    stops = np.linspace(0, 1, len(_INK))
    channels = [np.interp(level_MT, stops, _INK[:, c]) for c in range(3)]
    return np.ascontiguousarray(np.stack(channels, axis=-1).astype(np.uint8))
