"""Clips as pictures: the middle frame and the spectrogram of each, read from a feature store.

Knows nothing of what is shown or why. Invariant: each shard is read once a call, and a clip that
the pinned version does not hold is simply not in the answer.

Shapes: T valid fbank frames, M mel bins.
"""

import base64
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg
from numpy.typing import NDArray

from pipeline.config import FRAME_SHIFT_MS, FeatureSpec
from pipeline.decode.payload import fbank_array
from pipeline.store.store import FeatureStore, Snapshot, read_rows
from training.data.rows import clip_keys
from training.report.clips.spectrogram import spectrogram_jpeg

T = TypeVar("T")

_READERS = 4
"""Each holds a row group of 64 fbanks and frames, 20 MB of VGGSound's."""
_SIDE = 160
"""Frames are shown at 80 to 130 px; the store's own of 224 px and quality 95 would be 10 MB."""
_QUALITY = 80


class Spectrogram(NamedTuple):
    """A picture of a clip's fbank."""

    uri: str
    """`data:` URI of a JPEG."""
    seconds: float
    """How long it lasts from its left edge to its right one."""


class Pictures:
    """A pinned version of a store, as something to look at."""

    def __init__(self, store_uri: str, version: int | None) -> None:
        """Raises: StoreError (pipeline) if there is no such store or version."""
        self._snapshot: Snapshot = FeatureStore.open(store_uri).snapshot(version)
        rows = self._snapshot.rows(None)
        ids, places = rows["clip_id"].to_pylist(), rows["row"].to_pylist()
        labels, shards = _shared(rows["label"]), _shared(rows["shard"])
        self._place_of = dict(zip(ids, zip(shards, places, strict=True), strict=True))
        self.label_of: dict[str, str] = {i: n or "" for i, n in zip(ids, labels, strict=True)}

    @property
    def spec(self) -> FeatureSpec:
        """What the features of that version are."""
        return self._snapshot.spec

    @property
    def version(self) -> int:
        """Which version it is."""
        return self._snapshot.version

    @property
    def digest(self) -> str:
        """What clips that version holds, see `Snapshot.digest`."""
        return self._snapshot.digest

    def by_key(self) -> dict[int, tuple[str, str]]:
        """Clip id and label by the key that clustering knows a clip by."""
        ids = list(self.label_of)
        keys = clip_keys(ids).tolist()
        return {k: (i, self.label_of[i]) for k, i in zip(keys, ids, strict=True)}

    def source_clips(self, clip_ids: Iterable[str]) -> list[dict[str, Any]]:
        """Rows of the clips table of those clips that are there, in order of clip id."""
        wanted = sorted(set(clip_ids) & self._place_of.keys())
        clips = self._snapshot.clips
        mine = clips.filter(pc.is_in(clips["clip_id"], pa.array(wanted, pa.string())))
        return sorted(mine.to_pylist(), key=lambda clip: str(clip["clip_id"]))

    def frames(self, clip_ids: Iterable[str]) -> dict[str, str]:
        """The middle frame of each clip that is there, as a `data:` URI."""
        return self._read(
            clip_ids,
            ["frames"],
            lambda row: data_uri(small(row["frames"][len(row["frames"]) // 2])),
        )

    def spectrograms(self, clip_ids: Iterable[str]) -> dict[str, Spectrogram]:
        """The fbank of each clip that is there, low tones at the bottom."""
        return self.fbanks(
            clip_ids,
            lambda fbank_TM: Spectrogram(
                data_uri(spectrogram_jpeg(fbank_TM)), len(fbank_TM) * FRAME_SHIFT_MS / 1000
            ),
        )

    def fbanks(
        self, clip_ids: Iterable[str], use: Callable[[NDArray[np.float16]], T]
    ) -> dict[str, T]:
        """What `use` makes of the valid rows [T, M] of each clip's fbank."""
        spec = self.spec

        def valid(row: dict[str, Any]) -> T:
            return use(fbank_array(row["fbank"], spec)[: max(row["fbank_frames"] or 0, 1)])

        return self._read(clip_ids, ["fbank", "fbank_frames"], valid)

    def _read(
        self, clip_ids: Iterable[str], columns: list[str], use: Callable[[dict[str, Any]], T]
    ) -> dict[str, T]:
        by_shard: dict[str, list[tuple[int, str]]] = {}
        for clip_id in set(clip_ids) & self._place_of.keys():
            shard, row = self._place_of[clip_id]
            by_shard.setdefault(shard, []).append((row, clip_id))

        def read_shard(shard: str) -> dict[str, T]:
            places = sorted(by_shard[shard])
            rows = np.array([row for row, _ in places], dtype=np.int64)
            table = read_rows(self._snapshot.uri, shard, rows, columns)
            found = zip(places, table.to_pylist(), strict=True)
            return {clip_id: use(row) for (_, clip_id), row in found}

        with ThreadPoolExecutor(_READERS) as readers:
            return {
                c: made for part in readers.map(read_shard, by_shard) for c, made in part.items()
            }


def _shared(column: pa.ChunkedArray) -> list[str | None]:
    """The strings of a column, equal ones as one object: there are 200,000 of a few hundred."""
    coded = column.combine_chunks().dictionary_encode()
    names = coded.dictionary.to_pylist()
    return [None if k is None else names[k] for k in coded.indices.to_pylist()]


def small(jpeg: bytes) -> bytes:
    """A JPEG small enough for a page: one that is larger is decoded at a fraction of its side."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    if min(height, width) <= _SIDE:
        return jpeg
    image = simplejpeg.decode_jpeg(jpeg, min_height=_SIDE, min_width=_SIDE)
    return bytes(simplejpeg.encode_jpeg(image, quality=_QUALITY, colorsubsampling="420"))


def data_uri(jpeg: bytes) -> str:
    """A JPEG as a `data:` URI for an image element."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
